"""A module that stands for a loss elsewhere: what modules can do, and it cannot, it says."""

import inspect
import warnings
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from torch import nn

from gradbank.errors import InvalidRequest
from gradbank.losses.loss import Loss
from gradbank.memory import CrossBatchMemory

if TYPE_CHECKING:  # a `RemoteLoss` of which it is not said is that of any loss
    import typing_extensions

    L_co = typing_extensions.TypeVar("L_co", bound=Loss, covariant=True, default=Loss)
else:
    L_co = TypeVar("L_co", bound=Loss, covariant=True)  # what is hosted


class Hosted(nn.Module, Generic[L_co]):
    """A loss whose weights and bank are a server's, under the name of a session.

    Attributes:
        name: the session's.
    """

    _hosted: tuple[L_co]  # the last that a constructor sets: from then on its attributes are the server's

    def __init__(self, loss: L_co, name: str) -> None:
        super().__init__()
        self.name = name
        self._trains = any(weight.requires_grad for weight in loss.parameters())
        self._warned: set[str] = set()

    @property
    def hosted(self) -> L_co:
        """What the server was asked to host, as it was here when it was opened, with the statistics that it and its
        parts collect of the step whose result came last: `loss_fn.hosted.distance.final_avg_query_norm`."""
        return self._hosted[0]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the server computes."""

    def _warn(self, what: str) -> None:
        """Warns, once."""
        if what in self._warned:
            return
        self._warned.add(what)
        frame, level = inspect.currentframe(), 0
        while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("gradbank", "torch"):
            frame, level = frame.f_back, level + 1
        warnings.warn(what, UserWarning, stacklevel=level + 1)  # where the user's code calls

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self._trains or any(isinstance(each, CrossBatchMemory) for each in self.hosted.modules()):
            self._warn(
                f"the state_dict of a hosted loss is empty: weights and queue of {self.name!r} are the server's, and "
                "loss_fn.local().state_dict() has them"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Refused where it would freeze or thaw weights, for they are the server's.

        Raises:
            InvalidRequest: it would.
        """
        if any(weight.requires_grad != requires_grad for weight in self.hosted.parameters()):
            raise InvalidRequest(
                f"the weights of {self.name!r} are the server's: freeze them with requires_grad_(False) before "
                "client.open, or leave optimizer.step out"
            )
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        hosted = self.__dict__.get("_hosted")  # none while it is made
        known = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if hosted is not None and not known and hasattr(hosted[0], name):
            kind = type(hosted[0]).__name__
            raise AttributeError(
                f"{name!r} of the hosted {kind} is the server's, and cannot be set here: set it before client.open. "
                "loss_fn.local() is a copy with its weights and bank, which can be opened under another name"
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name not in dir(self.hosted):
                raise
            kind = type(self.hosted).__name__
            raise AttributeError(
                f"a hosted loss has no {name!r}: the {kind}'s is the server's, and loss_fn.local() is a copy"
            ) from None

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError(
            f"the hosted loss {self.name!r} is a connection, and can be neither copied nor pickled: keep it outside "
            "the module that is, or take loss_fn.local(), which is a loss with its weights and bank"
        )
