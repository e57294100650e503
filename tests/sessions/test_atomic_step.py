"""A step happens as a whole or not at all: every tensor operation of it is made to fail, one after the other."""

import copy
import itertools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradbank import losses
from gradbank.errors import GradbankError, LimitExceeded
from gradbank.losses.loss import Loss
from gradbank_server.build import build_loss
from gradbank_server.sessions import (
    Answer,
    Backward,
    Batch,
    Limits,
    OptimizerSpec,
    OptimizerStep,
    Sessions,
    ZeroGradient,
)
from gradbank_server.storage import MemoryStorage

RANK = 0
HERE = torch.empty(0).device  # as --device has it
SGD = OptimizerSpec("SGD", {"lr": 0.1, "momentum": 0.9})
ADAM = OptimizerSpec("Adam", {"lr": 0.1})
NEWS = (Backward(3, 1.0), OptimizerStep(0.5, {"lr": 0.05}), ZeroGradient(), Backward(2, 2.0))


class FailAt(TorchDispatchMode):
    """Makes the n-th tensor operation run out of memory."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.ran = n, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran += 1
        if self.ran == self.n:
            raise torch.OutOfMemoryError(f"out of memory at operation {self.n}: {func}")
        return func(*args, **(kwargs or {}))


class World:
    """A session three steps into its life, the same each time; its next step is number 4."""

    def __init__(self, make: Callable[[], Loss], optimizer: OptimizerSpec | None) -> None:
        torch.manual_seed(0)
        loss = make()
        weights = {name: value.detach() for name, value in loss.named_parameters()}
        open_sessions = Sessions(build_loss, HERE, Limits(), MemoryStorage(), lambda: 0.0)
        self.session = open_sessions.create("run", loss.spec(), weights)[0]
        self.epoch = self.session.attach(RANK, 1, b"a").epoch
        self.learns = optimizer is not None
        if optimizer is not None:
            self.session.configure(optimizer)
        self.step(1)
        self.step(2, (Backward(1, 1.0),))
        self.step(3, (OptimizerStep(1.0, {}),))

    def twin(self) -> "World":
        """A copy of everything, with a lock of its own."""
        locks = {id(self.session._turn): threading.RLock(), id(self.session._tallying): threading.Lock()}
        return copy.deepcopy(self, locks)

    def batch(self, seq: int, news: tuple = ()) -> Batch:
        random = torch.Generator().manual_seed(seq)
        return Batch(
            embeddings=torch.randn(6, 8, generator=random),
            labels=torch.randint(0, 3, (6,), generator=random),
            embeddings_need_gradient=True,
            weights_need_gradient=self.learns,
            weight_events=news if self.learns else (),
        )

    def step(self, seq: int, news: tuple = (), mode: AbstractContextManager | None = None) -> Answer:
        batch = self.batch(seq, news)
        with mode or nullcontext():
            answer, replayed = self.session.step(RANK, self.epoch, seq, seq, batch)[:2]
        assert not replayed
        return answer

    def everything(self) -> dict[str, Any]:
        """All that a step could change; reading it has waiting rows written into the bank."""
        learner, optimizer = self.session._learner, self.session._learner.optimizer
        held = [] if optimizer is None else [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
        group = {} if optimizer is None else {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        return {
            **self.session.state(),
            **{f"optimizer {i} {key}": value for i, state in enumerate(held) for key, value in state.items()},
            **{f"gradient {k} {i}": v for k, held in learner.gradients.items() for i, v in enumerate(held)},
            **{f"waiting {key} {i}": v for key, vs in learner.waiting.items() for i, v in enumerate(vs)},
            "options": group,
            "last_seq": self.session._producers[RANK].last_seq,
            "steps": self.session.tally.steps,
            "last loss": self.session.tally.last_loss,
            "optimizer steps": self.session.tally.optimizer_steps,
        }


def bank_of(inner: Loss, memory_size: int = 16) -> Loss:
    return losses.CrossBatchMemory(inner, 8, memory_size)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What changed, bit by bit."""
    return [name for name in before | after if not same(before.get(name), after.get(name))]


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


@pytest.mark.parametrize(
    ("make", "optimizer", "at_least"),
    [
        pytest.param(lambda: losses.NTXentLoss(), None, 40, id="NTXent"),
        pytest.param(lambda: bank_of(losses.NTXentLoss()), None, 60, id="memory of NTXent"),
        pytest.param(lambda: bank_of(losses.NTXentLoss(), 100), None, 60, id="memory of NTXent, not full"),
        pytest.param(lambda: bank_of(losses.TripletMarginLoss()), None, 60, id="memory of TripletMargin"),
        pytest.param(lambda: losses.ArcFaceLoss(3, 8), SGD, 60, id="ArcFace and SGD"),
        pytest.param(lambda: losses.ArcFaceLoss(3, 8), ADAM, 60, id="ArcFace and Adam"),
    ],
)
def test_a_step_that_fails_at_any_operation_changes_nothing(
    make: Callable[[], Loss], optimizer: OptimizerSpec | None, at_least: int
) -> None:
    start = World(make, optimizer)
    undisturbed = start.twin()
    expected = undisturbed.step(4, NEWS)
    before, afterwards = start.twin().everything(), undisturbed.everything()
    learned = {name.split()[0] for name in before} >= {"optimizer", "gradient", "waiting"}
    assert learned == (optimizer is not None)
    for n in itertools.count(1):
        world = start.twin()
        try:
            world.step(4, NEWS, mode := FailAt(n))
        except GradbankError as error:
            assert isinstance(error, LimitExceeded)  # noqa: PT017
            assert "nothing was changed" in str(error)  # noqa: PT017
        else:
            assert mode.ran < n, f"operation {n} failed and the step did not"
            break
        assert world.session.tally.rejected == 1
        if n % 2:  # reading the state settles the bank: every other time, the next step has to
            assert differences(before, world.everything()) == [], f"after a failure at operation {n}"
        answer = world.step(4, NEWS)
        assert torch.equal(answer.loss, expected.loss), f"after a failure at operation {n}"
        assert torch.equal(answer.embeddings_gradient, expected.embeddings_gradient), f"after operation {n}"
        assert differences(afterwards, world.everything()) == [], f"a step after a failure at operation {n}"
    assert n > at_least, "the loop saw too few operations to mean anything"


def test_a_bare_exception_in_the_middle_changes_nothing_either() -> None:
    class Interrupt(FailAt):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.ran += 1
            if self.ran == self.n:
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    start = World(lambda: losses.ArcFaceLoss(3, 8), ADAM)
    before = start.twin().everything()
    for n in (5, 25, 50):
        world = start.twin()
        with pytest.raises(KeyboardInterrupt):
            world.step(4, NEWS, Interrupt(n))
        assert differences(before, world.everything()) == []
