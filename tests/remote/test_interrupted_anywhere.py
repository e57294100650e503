"""Ctrl-C may come at any place of a step, gRPC's own code included: the trainer goes on, and nothing is done twice."""

import dis
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import losses
from gradbank_server.service import Server

D = 8
_OWN = str(Path(gradbank.__file__).parent / "remote")
_GRPC = (str(Path(grpc.__file__).parent), threading.__file__)
_LOOKS = ("RESUME", "CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD")  # after these Python looks for signals


class Interrupted(BaseException):
    """As Ctrl-C would raise."""


class Interrupt:
    """Raises at the n-th place where Python may raise on Ctrl-C, in this thread and in the code of some files.

    Attributes:
        places: how many have been passed.
    """

    def __init__(self, at: int, *files: str) -> None:
        self._at, self._files, self.places = at, files, 0
        self._last: dict[FrameType, str] = {}
        self._call, self._trace = self._called, self._traced  # held, for Python itself does not, as it calls them

    def __enter__(self) -> "Interrupt":
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        self._last.clear()

    def _called(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self._files):
            return None
        frame.f_trace_opcodes = True
        return self._trace

    def _traced(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            passed = self._last.get(frame)
            self._last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if passed in _LOOKS:
                self.places += 1
                if self.places == self._at:
                    sys.settrace(None)
                    raise Interrupted
        return self._trace


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, D, generator=generator), torch.arange(12) % 4


def memory() -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(), D, 30)


def interrupted(call: Callable[[], object], at: int, *files: str) -> bool:
    """Whether a call was, at a place of its; else it has fewer."""
    try:
        with Interrupt(at, *files):
            call()
    except Interrupted:
        return True
    except RuntimeError as error:  # of a lock that the interrupt left in a state that its owner does not know
        if not isinstance(error.__context__, Interrupted):
            raise
        return True
    except TypeError as error:  # Python's own, of a trace function that it let go of: an interrupt as any other
        if "'traceback' object is not callable" not in str(error):
            raise
        return True
    return False


def places(call: Callable[[], object], *files: str) -> int:
    with Interrupt(0, *files) as passed:
        call()
    return passed.places


@pytest.fixture(params=["tcp", "unix", "shm", "local"])
def connected(request: pytest.FixtureRequest, nearby: Server) -> Any:
    """A client of its own: what it holds may be broken by an interrupt."""
    address = "local://" if request.param == "local" else nearby.address
    with gradbank.connect(address, 20, "auto" if request.param == "local" else request.param) as client:
        yield client


@pytest.mark.parametrize("asks_again", [False, True])
def test_a_step_is_done_once(connected: gradbank.Client, name: str, asks_again: bool) -> None:
    there, here = connected.open(name, memory()), memory()
    for seed in range(2):
        assert torch.equal(there(*batch(seed)), here(*batch(seed)))
    last = places(lambda: there(*batch(0)), _OWN) - 1  # as it returns: asked for again after that, it is another step
    here(*batch(0))
    assert last > 100
    for at in range(1, last):
        steps = connected.stats(name).steps
        assert interrupted(lambda at=at: there(*batch(2 * at)), at, _OWN)
        if asks_again:
            there(*batch(2 * at))
        after = there(*batch(2 * at + 1))  # settles what is not known
        done = connected.stats(name).steps - steps - 1
        assert done == 1 or (done == 0 and not asks_again), f"place {at} of {last}"
        for _ in range(done):
            here(*batch(2 * at))
        assert torch.equal(after, here(*batch(2 * at + 1))), f"place {at} of {last}"


# gRPC's own, of a call that was interrupted as it was made
@pytest.mark.filterwarnings("ignore:.*_Rendezvous.__del__:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("asked", ["stats", "local"])
def test_steps_go_on_after_another_call_was_interrupted(connected: gradbank.Client, name: str, asked: str) -> None:
    there, here, at = connected.open(name, memory()), memory(), 1
    call: Callable[[], object] = there.local if asked == "local" else lambda: connected.stats(name)
    assert torch.equal(there(*batch(0)), here(*batch(0)))
    while interrupted(call, at, _OWN, *_GRPC):
        assert torch.equal(there(*batch(at)), here(*batch(at))), f"place {at}"
        at += 3
    assert at > 10


def test_steps_in_flight_are_done_once(connected: gradbank.Client, name: str) -> None:
    there, here, steps, at, answered = connected.open(name, memory()), memory(), 0, 0, False

    def three(at: int) -> None:
        for each in [there.submit(*batch(4 * at + i)) for i in range(3)]:
            each.result()

    while not answered:
        at += 2
        answered = not interrupted(lambda at=at: three(at), at, _OWN)
        after = there(*batch(4 * at + 3))
        done = connected.stats(name).steps - steps - 1
        assert done <= 3
        for i in range(done):
            here(*batch(4 * at + i))
        assert torch.equal(after, here(*batch(4 * at + 3))), f"place {at}"
        steps += done + 1
    assert at > 300


def test_weights_are_stepped_once(connected: gradbank.Client, name: str) -> None:
    here = losses.ArcFaceLoss(4, D)
    there, at = connected.open(name, here), 0
    far, near = there.optimizer("SGD", lr=0.1), torch.optim.SGD(here.parameters(), lr=0.1)
    while True:
        for loss_fn, optimizer in ((there, far), (here, near)):
            optimizer.zero_grad()
            loss_fn(*batch(2 * at)).backward()
            optimizer.step()
        if not interrupted(lambda at=at: there(*batch(2 * at + 1)), at + 1, _OWN):
            break
        at += 1
        assert connected.stats(name).optimizer_steps in (at - 1, at)
    there.flush()
    assert connected.stats(name).optimizer_steps == at + 1
    assert torch.equal(there.local().W, here.W)
    assert at > 100


@pytest.mark.parametrize("connected", ["tcp"], indirect=True)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # gRPC's own, interrupted in it
def test_a_lock_that_grpc_keeps_stops_nobody(connected: gradbank.Client, name: str) -> None:
    """An interrupt at the beginning of Condition.__exit__, for one, leaves the condition's lock taken."""
    there, here = connected.open(name, memory()), memory()
    steps, at, answered = 0, 0, False
    while not answered:
        at += 1
        answered = not interrupted(lambda at=at: there(*batch(2 * at)), at, *_GRPC)
        after = there(*batch(2 * at + 1))
        done = connected.stats(name).steps - steps - 1
        for _ in range(done):
            here(*batch(2 * at))
        assert torch.equal(after, here(*batch(2 * at + 1))), f"place {at}"
        steps += done + 1
    assert at > 20
