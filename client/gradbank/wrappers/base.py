"""What losses that call another loss share."""

from gradbank.component import foundation
from gradbank.losses.loss import Loss


@foundation
class BaseLossWrapper(Loss):
    """A loss that calls another. A wrapper of your own says in `supported_losses` which, and writes `forward`.

    Raises:
        ValueError: a loss that it cannot call.
    """

    loss: Loss

    def __post_init__(self) -> None:
        names = [each.__name__ for each in type(self.loss).__mro__]
        known = [name for name in names if name in self.supported_losses()]
        self.check_loss_support((known or names)[0])

    @staticmethod
    def supported_losses() -> list[str]:
        """The names of the losses that can be wrapped; a subclass of one can be, too."""
        raise NotImplementedError("a loss wrapper must define supported_losses")

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        """Refuses, by ValueError, a loss that is not supported."""
        if loss_name not in cls.supported_losses():
            raise ValueError(
                f"{cls.__name__} does not support {loss_name}; it does {', '.join(cls.supported_losses())}"
            )
