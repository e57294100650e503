"""The optimizer of weights that live on the server, in the shape that torch's trainers and schedulers know."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradbank.errors import InvalidRequest
from gradbank.optimizers import optimizer_named
from gradbank.protocol import GRADIENTS_KEPT
from gradbank.v1 import session_pb2, step_pb2
from gradbank.wire import argument_messages


class RemoteOptimizer(torch.optim.Optimizer):
    """Steps a hosted loss's weights. `step` and `zero_grad` cost no round trip: they ride on the next batch.

    The one parameter of its group is a scalar that stands for all weights on the server. Its gradient is the number of
    backward passes that reached it, so what multiplies gradients between `backward` and `step`, as an AMP scaler does,
    multiplies the weights' too. (Clipping by norm does not: it would clip the scalar.)
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        made = optimizer_named(name)
        self.token = nn.Parameter(torch.ones(()))
        try:  # with a matrix, for some take no scalar
            defaults = made([nn.Parameter(torch.ones(1, 1))], **options).defaults
        except Exception as error:
            raise InvalidRequest(f"{name} cannot be made: {error}") from None
        super().__init__([self.token], defaults)
        self.name, self.options = name, options
        self._since = _Since()
        self.token.register_post_accumulate_grad_hook(self._land)  # type: ignore[no-untyped-call]  # torch's
        self._kept: deque[int] = deque(maxlen=GRADIENTS_KEPT)  # steps whose weight gradients the server keeps
        self.events: list[step_pb2.WeightEvent] = []
        self.told = 0  # how many there were before these
        self.retired = False  # whether its loss was opened anew, which has no optimizer then

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups:
            raise InvalidRequest(
                "the weights of a hosted loss are one group; give other parameters their own optimizer"
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the options of another one. Momenta and the like are the server's, and are in no `state_dict`.

        Raises:
            InvalidRequest: a state that has some.
        """
        if state_dict.get("state"):
            raise InvalidRequest(
                "the optimizer of a hosted loss keeps its state on the server, which takes none from here: load a "
                "state_dict() of such an optimizer, or train the loss here"
            )
        super().load_state_dict(state_dict)

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError(
            "the optimizer of a hosted loss can be neither copied nor pickled, for its state is the server's: "
            "state_dict() has its options"
        )

    def spec(self) -> session_pb2.Optimizer:
        return session_pb2.Optimizer(name=self.name, options=argument_messages(self.options, self.name))

    def drop(self, told: int) -> None:
        """Forgets all but what came after the first `told` events: they were carried out, or never can be."""
        if told > self.told:
            count, self.told = told - self.told, told
            del self.events[:count]

    def will_keep(self, seq: int) -> None:
        """Notes that the server keeps the weight gradient of step `seq`."""
        if seq not in self._kept:  # as it is if the call was interrupted, and the step asked for again
            self._kept.append(seq)

    def saw(self, seq: int, scale: float) -> None:
        """Notes a backward pass through the loss of step `seq`, which counts if it also reaches the token.

        Raises:
            InvalidRequest: the second one, or one that comes too late.
        """
        if seq not in self._kept:
            raise InvalidRequest(
                "backward through a hosted loss with learnable weights may be called once, and at most "
                f"{GRADIENTS_KEPT - 1} losses later: the server keeps no more of their gradients"
            )
        if self._since.landed and (self.token.grad is None or not self.token.grad):
            self._forget()  # the gradient was set to None, or to 0, by someone else than zero_grad
        # of this pass: another that noted something may have failed, or was asked for gradients of something else
        task = torch._C._current_graph_task_id()
        self._since.passing = [each for each in self._since.passing if each[0] == task] + [(task, seq, scale)]

    def _land(self, token: Tensor) -> None:
        """The gradients of a backward pass reached the token."""
        for _, seq, scale in self._since.passing:
            self._kept.remove(seq)
            self._since.seen += 1
            self.events.append(step_pb2.WeightEvent(backward=step_pb2.Backward(seq=seq, scale=scale)))
        self._since.passing, self._since.landed = [], True

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Has the weights stepped, before the next batch's loss is computed.

        Args:
            closure: called first, as torch's optimizers do, with gradients on; what it gives is returned.
        """
        if self.retired:
            raise InvalidRequest(
                "this optimizer is of a loss that was opened anew: make one by loss_fn.optimizer(...) of the new loss"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.token.grad is None:
            return loss  # no backward pass since zero_grad: as in torch, nothing to do
        seen, group = self._since.seen, self.param_groups[0]
        scale = float(self.token.grad) / seen if seen else 1.0
        given = {name: _plain(group[name]) for name in self.defaults}
        options = {name: value for name, value in given.items() if value is not None}
        asked = step_pb2.OptimizerStep(gradient_scale=scale, options=argument_messages(options, self.name))
        self.events.append(step_pb2.WeightEvent(optimizer_step=asked))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.token.grad = None
        self._forget()

    def _forget(self) -> None:
        """Has the server forget the gradients that it added up."""
        self._since.seen, self._since.landed = 0, False
        if not (self.events and self.events[-1].HasField("zero_gradient")):
            self.events.append(step_pb2.WeightEvent(zero_gradient=True))


@dataclass
class _Since:
    """What came since the last `zero_grad`; apart, for frameworks wrap an optimizer in a copy of its attributes.

    Attributes:
        seen: the number of losses whose backward passes reached the token.
        landed: whether there was one.
        passing: the task, step and scale of each loss of the backward pass that is under way.
    """

    seen: int = 0
    landed: bool = False
    passing: list[tuple[int, int, float]] = field(default_factory=list)


def _plain(value: Any) -> Any:
    """An option as it can be told: a number, whoever made it, or a tuple of such; None for any other."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        return value.item()
    if isinstance(value, tuple | list):
        items = tuple(map(_plain, value))
        return items if all(isinstance(item, int | float) for item in items) else None
    return value if isinstance(value, bool | int | float) else None
