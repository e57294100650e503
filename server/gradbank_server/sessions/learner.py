"""A session's learnable weights and their optimizer, updated without touching what is in use."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradbank.errors import InvalidRequest, InvalidUpdate
from gradbank.optimizers import optimizer_named
from gradbank.protocol import GRADIENTS_KEPT
from gradbank_server.sessions.batch import Backward, OptimizerSpec, OptimizerStep, WeightEvent, ZeroGradient


def is_out_of_memory(error: Exception) -> bool:
    """Whether there was no room; on a CPU, torch says so with a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


Gradients = list[Tensor | None]  # of all weights; None of one that the loss does not reach
Waiting = OrderedDict[tuple[int, int], Gradients]


class Update:
    """The weights, optimizer and gradients as they will be if a rank's step succeeds.

    Inside a `with` block the loss computes with them; what is not committed by its end has not been.
    """

    def __init__(self, learner: "Learner", rank: int) -> None:
        self._learner, self._rank = learner, rank
        self._before = [weight.data for weight in learner.weights]
        self.values = list(self._before)
        self.optimizer, self.gradient = learner.optimizer, learner.gradients.get(rank)
        self.waiting: Waiting = OrderedDict(learner.waiting)
        self.optimizer_steps = 0
        self._committed = False

    def add(self, seq: int, scale: float) -> None:
        """Adds a step's weight gradient, times `scale`, to the accumulated one."""
        if (self._rank, seq) not in self.waiting:
            raise InvalidUpdate(
                f"the weight gradient of step {seq} is not kept: call backward at most {GRADIENTS_KEPT - 1} steps "
                "after the loss, and once only"
            )
        made = [None if each is None else each * scale for each in self.waiting.pop((self._rank, seq))]
        before = self.gradient or [None] * len(made)
        self.gradient = [b if m is None else m if b is None else b + m for b, m in zip(before, made)]

    def step(self, scale: float, options: Mapping[str, Any]) -> None:
        """Steps copies of the weights by a copy of the optimizer."""
        if self.optimizer is None:
            raise InvalidUpdate("the session has no optimizer; give it one with loss_fn.optimizer(...)")
        self.optimizer_steps += 1
        if self.gradient is None:
            return  # as in torch: weights without a gradient stay
        copies = [nn.Parameter(value.clone()) for value in self.values]
        beside = type(self.optimizer)(copies)  # type: ignore[call-arg]
        held, group = self.optimizer.param_groups[0], beside.param_groups[0]
        for name in options:
            if name not in held or name == "params":
                raise InvalidUpdate(f"{type(self.optimizer).__name__} has no option {name!r}")
            if isinstance(held[name], float | int) and not isinstance(options[name], float | int):
                raise InvalidUpdate(f"{name} must be a number, got {options[name]!r}")
        group.update({name: value for name, value in held.items() if name != "params"}, **options)
        for weight, copy, gradient in zip(held["params"], copies, self.gradient):
            state = self.optimizer.state.get(weight, {})
            beside.state[copy] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
            if gradient is not None:  # else as of a weight that no loss reached
                # laid out as the weight is, which a fused step takes for granted, and a gradient need not be
                copy.grad = torch.empty_like(copy.data).copy_(gradient * scale)
        try:
            beside.step()
        except Exception as error:  # torch divides by zero, overflows, asserts
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise
            raise InvalidUpdate(f"{type(beside).__name__} cannot step with {dict(options)}: {error}") from None
        if not all(bool(copy.isfinite().all()) for copy in copies):
            raise InvalidUpdate(
                f"the optimizer's step makes the weights infinite or NaN (gradient scale {scale}, {dict(options)}); "
                "they are as they were, and the step was dropped. Look for a learning rate that is too high, or for an "
                "AMP scale under which the weights' gradients overflow"
            )
        for copy in copies:
            copy.grad = None
        self.values, self.optimizer = [copy.data for copy in copies], beside

    def keep(self, seq: int, gradients: Gradients) -> None:
        """Keeps a step's weight gradients until its backward pass is told."""
        self.waiting[self._rank, seq] = gradients
        for old in [key for key in self.waiting if key[0] == self._rank][:-GRADIENTS_KEPT]:
            del self.waiting[old]

    def commit(self) -> None:
        learner = self._learner
        gradients = {rank: each for rank, each in learner.gradients.items() if rank != self._rank}
        if self.gradient is not None:
            gradients[self._rank] = self.gradient
        learner.optimizer, learner.gradients, learner.waiting = self.optimizer, gradients, self.waiting
        self._committed = True

    def __enter__(self) -> "Update":
        self._put(self.values)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._committed:
            self._put(self._before)

    def _put(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._learner.weights, values):
            weight.data = value  # a reference, not a copy: nothing here can fail half-way


class Learner:
    """The parameters of a loss, the optimizer that steps them, and gradients on their way to it.

    Attributes:
        gradients: what the backward passes of a rank added up to since its last `zero_grad`; a rank without is at zero.
        waiting: weight gradients of steps whose backward pass is not told yet, by (rank, seq).
    """

    def __init__(self, loss: nn.Module) -> None:
        self.names = [name for name, _ in loss.named_parameters()]
        self.weights = [weight for _, weight in loss.named_parameters()]
        self.optimizer: torch.optim.Optimizer | None = None
        self.spec: OptimizerSpec | None = None
        self.defaults: dict[str, Any] = {}  # all options of it, as it was made
        self.gradients: dict[int, Gradients] = {}
        self.waiting: Waiting = OrderedDict()

    @property
    def gradient_bytes(self) -> int:
        """What all gradients take."""
        held = (*self.gradients.values(), *self.waiting.values())
        return sum(gradient.nbytes for gradients in held for gradient in gradients if gradient is not None)

    def forget(self, rank: int) -> None:
        """Drops the gradients of a rank, whose trainer is another from now on."""
        self.gradients = {each: held for each, held in self.gradients.items() if each != rank}
        self.waiting = OrderedDict((key, held) for key, held in self.waiting.items() if key[0] != rank)

    def configured(self, spec: OptimizerSpec) -> torch.optim.Optimizer:
        """An optimizer of the weights.

        Raises:
            InvalidRequest: no such optimizer or option, or a loss without weights.
        """
        if not self.weights:
            raise InvalidRequest("this loss has no learnable weights, so there is nothing to optimize")
        made = optimizer_named(spec.name)
        try:
            return made(self.weights, **spec.options)
        except Exception as error:
            raise InvalidRequest(f"{spec.name} cannot be made: {error}") from None

    def configure(self, spec: OptimizerSpec) -> None:
        made = self.configured(spec)
        self.defaults = dict(made.defaults)
        self.optimizer, self.spec = made, OptimizerSpec(spec.name, dict(spec.options))

    def stage(self, rank: int, events: tuple[WeightEvent, ...]) -> Update:
        """What a rank's events make of the weights, in order; nothing that is in use is written.

        Raises:
            InvalidUpdate: a step without an optimizer or with an option that it does not have, weights that would not
                be finite, or a backward pass whose gradient is no longer kept.
        """
        update = Update(self, rank)
        for event in events:
            match event:
                case Backward(seq, scale):
                    update.add(seq, scale)
                case OptimizerStep(scale, options):
                    update.step(scale, options)
                case ZeroGradient():
                    update.gradient = None
        return update
