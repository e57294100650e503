"""Who lets go of steps in flight, and who closes: nobody waits on, and what was asked can be asked for again."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import losses
from gradbank.errors import DeadlineExceeded, GradbankError, NonFiniteError, ServerUnavailable, StepConflict
from gradbank_server.service import Server
from gradbank_server.sessions.producers import Producer
from gradbank_server.settings import ServerSettings

from .conftest import wait_until

pytestmark = pytest.mark.usefixtures("ahead")


def memory() -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(), 16, 50)


def batch(seed: int, rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 16, generator=generator), torch.arange(rows) % 4


def raised(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except GradbankError as error:
        return error
    return None


@pytest.mark.parametrize("shared", [False, True], ids=["tcp", "shm"])
def test_closing_the_loss_leaves_no_one_waiting(name: str, shared: bool) -> None:
    settings = ServerSettings(port=0, metrics_port=-1, drain_seconds=1, shared_memory=shared)
    with Server(settings) as running, gradbank.connect(running.address, timeout=20) as client:
        there = client.open(name, memory())
        there(*batch(0))
        turn = running.service.sessions[name]._turn
        free, held = threading.Event(), threading.Event()

        def hold() -> None:
            with turn:
                held.set()
                free.wait(20)

        threading.Thread(target=hold, daemon=True).start()
        held.wait(20)
        future, told = there.submit(*batch(1)), []

        def wait() -> None:
            try:
                future.result()
            except ServerUnavailable as error:
                told.append(str(error))

        waiter = threading.Thread(target=wait)
        waiter.start()
        there.close()
        waiter.join(10)
        free.set()
        assert told == ["the loss was closed before the step was answered"]
        there(*batch(2))


@pytest.mark.parametrize("ends", ["closed", "late"])
def test_what_is_let_go_of_behind_a_refused_step_can_be_asked_for_again(
    near: gradbank.Client, name: str, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """Those behind it were sent under numbers that are others' now."""
    refusing, goes_on, recall = threading.Event(), threading.Event(), Producer.recall

    def slow(self: Producer, *arguments: Any) -> Any:
        try:
            return recall(self, *arguments)
        except StepConflict:
            refusing.set()
            goes_on.wait(20)
            raise

    there, here = near.open(name, memory()), memory()
    assert torch.equal(there(*batch(0)), here(*batch(0)))
    monkeypatch.setattr(Producer, "recall", slow)
    bad, labels = batch(1)
    futures = [there.submit(bad * torch.nan, labels), there.submit(*batch(2)), there.submit(*batch(3))]
    reader = threading.Thread(target=lambda: raised(futures[0].result))
    reader.start()
    assert refusing.wait(20)
    wait_until(lambda: there.producer._flight.halted)  # by the refusal of the first
    if ends == "closed":
        there.close()
    else:
        there.producer.timeout = 0.1
        assert isinstance(raised(futures[2].result), DeadlineExceeded)
        there.producer.timeout = 20
    goes_on.set()
    reader.join(20)
    assert isinstance(raised(futures[0].result), NonFiniteError)
    for seed in (2, 3, 4):
        assert torch.equal(there(*batch(seed)), here(*batch(seed)))
    assert near.stats(name).steps == 4


@pytest.mark.parametrize("way", ["tcp", "shm"])
def test_closing_the_client_leaves_no_one_waiting(nearby: Server, name: str, way: Any) -> None:
    """Neither who waits for an answer, nor who waits for room to send."""
    client = gradbank.connect(nearby.address, timeout=30, via=way)
    there = client.open(name, memory())
    there(*batch(0))
    told: list[BaseException | None] = []
    with nearby.service.sessions[name]._turn:

        def call(seed: int) -> None:
            told.append(raised(lambda: there(*batch(seed))))

        threads = [threading.Thread(target=call, args=(seed,)) for seed in range(1, 8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(there.producer._flight) > 0)
        client.close()
        for thread in threads:
            thread.join(15)
    assert [type(error) for error in told] == [ServerUnavailable] * 7
    assert all("closed" in str(error) for error in told)
