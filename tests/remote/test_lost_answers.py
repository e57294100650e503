"""A step is carried out once, whatever the network does to it on its way."""

import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.errors import DeadlineExceeded, Fenced, GradbankError, InvalidRequest, LimitExceeded
from gradbank.remote.channel import GrpcTransport
from gradbank.remote.flight import Flight
from gradbank_server.service import Server
from gradbank_server.sessions import Batch

from .conftest import Proxy, serving, wait_until

UP, DOWN = "up", "down"


def memory() -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(), 16, 100)


def batch(seed: int, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 16, generator=made, requires_grad=True), torch.randint(0, 4, (rows,), generator=made)


def loss_and_gradient(loss_fn: Callable[..., torch.Tensor], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    embeddings, labels = batch(seed)
    loss = loss_fn(embeddings, labels)
    loss.backward()
    return loss.detach(), embeddings.grad


def assert_same(there: Any, here: Any, seed: int) -> None:
    for made, expected in zip(loss_and_gradient(there, seed), loss_and_gradient(here, seed), strict=True):
        assert torch.equal(made, expected), f"batch {seed}"


@pytest.fixture
def steps(server: Server, name: str) -> Callable[[], int]:
    """How many steps the session of this test has carried out."""
    return lambda: server.service.sessions[name].tally.steps


def test_a_step_whose_answer_is_lost_is_answered_from_store(
    proxy: Any, far: gradbank.Client, near: gradbank.Client, name: str, steps: Callable[[], int]
) -> None:
    there, here = far.open(name, memory()), memory()
    assert_same(there, here, 1)
    proxy.lose_answers_until(lambda: steps() == 2)
    assert_same(there, here, 2)
    assert_same(there, here, 3)
    stats = near.stats(name)
    assert (stats.steps, stats.replayed, stats.bank_rows, proxy.cuts) == (3, 1, 24, 1)
    assert torch.equal(there.local().embedding_memory, here.embedding_memory)


def test_a_connection_may_break_at_any_byte(
    proxy: Any, far: gradbank.Client, near: gradbank.Client, name: str, steps: Callable[[], int]
) -> None:
    there, here = far.open(name, memory()), memory()
    for seed in range(60):
        where = random.Random(seed)
        match seed % 4:
            case 0:
                proxy.cut_after(UP, where.randrange(1, 900))
            case 1:
                proxy.cut_after(DOWN, where.randrange(1, 700))
            case 2:
                proxy.lose_answers_until(lambda seed=seed: steps() == seed + 1)
        assert_same(there, here, seed)
    stats = near.stats(name)
    assert stats.steps == 60
    assert stats.replayed >= 10
    assert proxy.cuts >= 30
    assert torch.equal(there.local().embedding_memory, here.embedding_memory)


def test_a_step_whose_stream_broke_waits_for_the_place_of_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server computes it, and holds the stream's place until it is done."""
    refused: list[GradbankError] = []
    answer = Flight.answer

    def watched(self: Flight, *arguments: Any) -> Any:
        try:
            return answer(self, *arguments)
        except LimitExceeded as error:
            refused.append(error)
            raise

    monkeypatch.setattr(Flight, "answer", watched)
    with serving(max_streams=1) as running:
        between = Proxy(running.port)
        with gradbank.connect(between.address, timeout=20, via="tcp") as client:
            there, here = client.open(name, memory()), memory()
            assert_same(there, here, 1)
            session, come = running.service.sessions[name], list[float]()
            monkeypatch.setattr(session, "_clock", lambda: come.append(time.perf_counter()) or come[-1])
            with session._turn:
                future = there.submit(*batch(2))
                wait_until(lambda: bool(come))
                asked = threading.Thread(target=future.result)
                between.cut()
                asked.start()
                wait_until(lambda: bool(refused))
            assert torch.equal(future.result(), here(*batch(2)))
            asked.join()
            assert_same(there, here, 3)
        between.close()


def lost(proxy: Any, direction: str, there: gradbank.RemoteLoss, seed: int) -> None:
    """Has a step fail by the clock, with one direction of the network dead; then the network is well again."""
    proxy.lose(direction)
    there.producer.timeout, patience = 1.0, there.producer.timeout
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"step \d+ was not answered within (1|0\.\d+) s"):
        there(*batch(seed))
    assert time.monotonic() - begun < 3
    there.producer.timeout = patience
    proxy.cut()


@pytest.mark.parametrize(("direction", "counted"), [(DOWN, True), (UP, False)], ids=["carried out", "never arrived"])
def test_a_step_in_doubt_is_settled_before_another_batch(
    proxy: Any, far: gradbank.Client, near: gradbank.Client, name: str, direction: str, counted: bool
) -> None:
    there, here = far.open(name, memory()), memory()
    assert_same(there, here, 1)
    lost(proxy, direction, there, 2)
    if counted:
        here(*batch(2))
    assert torch.equal(there(*batch(3)), here(*batch(3)))
    assert_same(there, here, 4)
    assert near.stats(name).steps == 3 + counted


@pytest.mark.parametrize("direction", [DOWN, UP], ids=["carried out", "never arrived"])
def test_a_step_in_doubt_may_be_asked_again(
    proxy: Any, far: gradbank.Client, near: gradbank.Client, name: str, direction: str
) -> None:
    there, here = far.open(name, memory()), memory()
    assert_same(there, here, 1)
    lost(proxy, direction, there, 2)
    assert torch.equal(there(*batch(2)), here(*batch(2)))
    assert_same(there, here, 3)
    assert near.stats(name).steps == 3


@pytest.mark.parametrize("direction", [DOWN, UP], ids=["carried out", "never arrived"])
def test_a_step_in_doubt_may_be_asked_again_where_another_failed_too(
    proxy: Any, far: gradbank.Client, near: gradbank.Client, name: str, direction: str
) -> None:
    there, here = far.open(name, memory()), memory()
    assert_same(there, here, 1)
    proxy.lose_all(direction)
    patience, there.producer.timeout, far.timeout = there.producer.timeout, 1.0, 1.0
    for seed in (2, 3):  # the server learns of a new epoch, and its answer is lost
        with pytest.raises(GradbankError):
            there(*batch(seed))
    there.producer.timeout = patience
    proxy.cut()
    for seed in (2, 3, 4):
        assert_same(there, here, seed)
    assert near.stats(name).steps == 4
    assert torch.equal(there.local().embedding_memory, here.embedding_memory)


def test_a_step_whose_answer_was_lost_has_a_place_among_those_that_backward_may_come_to(
    proxy: Any, far: gradbank.Client, name: str
) -> None:
    there = far.open(name, losses.ArcFaceLoss(4, 16))
    optimizer = there.optimizer("SGD", lr=0.1)
    first = there(*batch(1))
    lost(proxy, DOWN, there, 2)
    others = [there(*batch(seed)) for seed in (3, 4, 5)]
    with pytest.raises(InvalidRequest, match="at most 3 losses later"):
        first.backward()
    for loss in others:
        loss.backward()
    optimizer.step()
    there(*batch(6)).backward()  # the server refuses nothing of what it is told


@pytest.mark.parametrize("direction", [DOWN, UP], ids=["carried out", "never arrived"])
def test_news_of_a_step_in_doubt_is_carried_out_once(
    proxy: Any, far: gradbank.Client, near: gradbank.Client, name: str, direction: str
) -> None:
    torch.manual_seed(0)
    here = losses.ArcFaceLoss(4, 16)
    there = far.open(name, here)
    pairs = [
        (there, there.optimizer("SGD", lr=0.1, momentum=0.9)),
        (here, torch.optim.SGD(here.parameters(), lr=0.1, momentum=0.9)),
    ]
    for loss_fn, _ in pairs:
        loss_fn(*batch(1)).backward()
    assert torch.equal(there(*batch(2)).detach(), here(*batch(2)).detach())  # tells of the backward pass
    for _, optimizer in pairs:
        optimizer.step()
    lost(proxy, direction, there, 3)  # tells of the optimizer's step
    here(*batch(3))
    assert torch.equal(there(*batch(4)).detach(), here(*batch(4)).detach())
    assert near.stats(name).optimizer_steps == 1
    assert torch.equal(there.local().W, here.W)


class Late(GrpcTransport):
    """Delivers what it was given to deliver after a trainer was told that it had not arrived."""

    deliver: Callable[[], object] | None = None

    def call(self, method: str, request: Any, timeout: float) -> Any:
        answer = super().call(method, request, timeout)
        if method == "AttachSession" and self.deliver is not None:
            self.deliver()
        return answer


def test_what_arrives_after_it_was_given_up_does_not_stop_the_trainer(server: Server, proxy: Any, name: str) -> None:
    """The request of a step in doubt may still be under way when the trainer goes on to another batch."""
    transport = Late(proxy.address)
    with gradbank.Client(transport, proxy.address, 20) as client:
        there = client.open(name, memory())
        there(*batch(1))
        lost(proxy, UP, there, 2)
        epoch, session = there.producer.tenure.epoch, server.service.sessions[name]

        def deliver() -> None:
            transport.deliver = None
            with suppress(Fenced):
                session.step(0, epoch, 2, 0, Batch(batch(2)[0].detach(), batch(2)[1]))

        transport.deliver = deliver
        for seed in (3, 4):
            there(*batch(seed))
