"""The optimizer of weights that live on the server, in the shape that torch's trainers and schedulers know."""

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gradbank.errors import InvalidRequest
from gradbank.optimizers import optimizer_named
from gradbank.protocol import GRADIENTS_KEPT
from gradbank.v1 import session_pb2, step_pb2
from gradbank.wire import argument_messages

_MOST_PASSING = 64  # losses of passes that never reached the weights, as of gradients of the embeddings alone


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
        # torch holds the hook where nobody sees through who looks for cycles
        land = weakref.WeakMethod(self._land)
        self.token.register_post_accumulate_grad_hook(lambda _: (land() or _nobody)())  # type: ignore[no-untyped-call]  # torch's
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
        self._check_kept(seq)
        since, now = self._since, 0.0 if self.token.grad is None else float(self.token.grad)
        # what another pass noted may not have landed yet, if this one runs within it
        passing = [each for each in since.passing if each.seq in self._kept]
        own = _Pass(torch._C._current_graph_task_id(), seq, scale, since.landings, now)
        since.passing = [*passing, own][-_MOST_PASSING:]

    def _check_kept(self, seq: int) -> None:
        if seq not in self._kept:
            raise InvalidRequest(
                "backward through a hosted loss with learnable weights may be called once, and at most "
                f"{GRADIENTS_KEPT - 1} losses later: the server keeps no more of their gradients"
            )

    def _land(self) -> None:
        """The gradients of a backward pass reached the token, which has counted its losses."""
        since, task = self._since, torch._C._current_graph_task_id()
        landed = [each for each in since.passing if each.task == task]
        if not landed:
            return
        since.passing = [each for each in since.passing if each.task != task]
        found = landed[0].found
        # unless another pass landed within this one, after it was looked at
        if since.landings == landed[0].landings and since.counted not in (None, found):
            if not found or not since.counted:
                self._forget()  # the gradient was set to None, or to 0
            else:  # or multiplied, which is not meant for those to come
                since.factor *= found / since.counted
        since.landings += 1
        for each in landed:
            self._check_kept(each.seq)
            self._kept.remove(each.seq)
            backward = step_pb2.Backward(seq=each.seq, scale=each.scale / since.factor)
            self.events.append(step_pb2.WeightEvent(backward=backward))
        assert self.token.grad is not None  # it has just been added to
        since.counted = float(self.token.grad)

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
        since, group = self._since, self.param_groups[0]
        found = float(self.token.grad)
        ratio = found / since.counted if since.counted and found != since.counted else 1.0
        scale = since.factor * ratio
        options = self._told(group)
        asked = step_pb2.OptimizerStep(gradient_scale=scale, options=argument_messages(options, self.name))
        self.events.append(step_pb2.WeightEvent(optimizer_step=asked))
        return loss

    def _told(self, group: dict[str, Any]) -> dict[str, Any]:
        """The options of a step: those that are numbers, and what else was set to something new.

        Raises:
            InvalidRequest: that is nothing that can be told.
        """
        options = {}
        for name, default in self.defaults.items():
            if name not in group:  # torch adds some to the defaults of all that load a state
                continue
            value = _plain(group[name])
            if isinstance(value, bool | int | float) or value != _plain(default):
                options[name] = value
        try:
            argument_messages(options, self.name)
        except TypeError as error:
            raise InvalidRequest(f"an option of the optimizer cannot be told to the server: {error}") from None
        return options

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none and self.token.grad is not None:
            self.token.grad.zero_()  # a step goes on by momentum; the next pass has the server forget the rest
            return
        self.token.grad = None
        self._forget()

    def _forget(self) -> None:
        """Has the server forget the gradients that it added up."""
        self._since.counted, self._since.factor = None, 1.0
        if not (self.events and self.events[-1].HasField("zero_gradient")):
            self.events.append(step_pb2.WeightEvent(zero_gradient=True))


@dataclass
class _Since:
    """What came since the last `zero_grad`; apart, for frameworks wrap an optimizer in a copy of its attributes.

    Attributes:
        landings: how many passes reached the token.
        counted: its gradient, as the last of them left it; None where none has since it was zeroed.
        factor: by how much what the server adds up is to be multiplied, on top of what the token's gradient says.
        passing: the losses of backward passes that have not reached the token, and perhaps will not.
    """

    landings: int = 0
    counted: float | None = None
    factor: float = 1.0
    passing: list["_Pass"] = field(default_factory=list)


class _Pass(NamedTuple):
    """A loss that a backward pass came through.

    Attributes:
        task: torch's number of the pass.
        seq, scale: of which step, and what it brought.
        landings: how many passes had reached the token then.
        found: what its gradient was.
    """

    task: int
    seq: int
    scale: float
    landings: int
    found: float


def _nobody() -> None:
    """Stands for an optimizer that is gone."""


def _plain(value: Any) -> Any:
    """An option as it can be told: numbers are such, whoever made them."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        return value.item()
    return tuple(map(_plain, value)) if isinstance(value, tuple | list) else value
