"""Several steps in flight: the same losses, in the same order, each carried out once."""

import random
import socket
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import losses
from gradbank.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NonFiniteError,
    ServerUnavailable,
)
from gradbank.remote.future import StepFuture
from gradbank_server.service import Server
from gradbank_server.service.steps import Arrived
from gradbank_server.sessions import Session
from gradbank_server.settings import ServerSettings

from .conftest import DOWN, UP

pytestmark = pytest.mark.usefixtures("ahead")


def memory() -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(), 16, 50)


def batch(seed: int, rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 16, generator=generator).requires_grad_(), torch.arange(rows) % 4


def assert_same(there: Tensor, leaf: Tensor, here: losses.Loss, seed: int) -> None:
    """That a loss of a batch, and its gradient, are those of the same loss here, at its turn."""
    own, labels = batch(seed, len(leaf))
    expected = here(own, labels)
    for value in (there, expected):
        value.backward()
    assert torch.equal(there, expected)
    assert torch.equal(leaf.grad, own.grad)  # type: ignore[arg-type]  # both have one


def submitted(there: gradbank.RemoteLoss, *seeds: int) -> list[tuple[StepFuture, Tensor, int]]:
    made = []
    for seed in seeds:
        leaf, labels = batch(seed, rows=8 + 20 * (seed % 3))
        made.append((there.submit(leaf, labels), leaf, seed))
    return made


def test_what_is_submitted_is_what_is_called(anyway: gradbank.Client, name: str) -> None:
    there, here = anyway.open(name, memory()), memory()
    for future, leaf, seed in submitted(there, *range(10)):  # more than may be in flight
        assert_same(future.result(), leaf, here, seed)
    assert anyway.stats(name).steps == 10


def test_steps_in_flight_may_be_of_any_size(anyway: gradbank.Client, name: str) -> None:
    there, here = anyway.open(name, losses.ContrastiveLoss()), losses.ContrastiveLoss()
    sizes = (8, 1100, 40, 1500, 2100, 8, 0, 1200)  # of which the rooms of the first hold few
    leaves = [batch(seed, rows) for seed, rows in enumerate(sizes)]
    futures = [there.submit(*each) for each in leaves]
    for seed, (future, (leaf, _)) in enumerate(zip(futures, leaves)):
        assert_same(future.result(), leaf, here, seed)


def test_results_may_be_asked_for_in_any_order_and_calls_made_in_between(anyway: gradbank.Client, name: str) -> None:
    there, here = anyway.open(name, memory()), memory()
    first, second, third = submitted(there, 0, 1, 2)
    late = third[0].result()
    leaf, labels = batch(3)
    called = there(leaf, labels)
    for future, own, seed in (first, second):
        assert_same(future.result(), own, here, seed)
    assert_same(late, third[1], here, 2)
    assert_same(called, leaf, here, 3)
    assert third[0].result() is late


@pytest.mark.parametrize("place", range(4))
def test_one_that_is_refused_takes_no_other_along(anyway: gradbank.Client, name: str, place: int) -> None:
    there, here = anyway.open(name, memory()), memory()
    flight: list[Any] = submitted(there, *range(place))
    refused = there.submit(torch.full((12, 16), torch.nan), batch(0)[1])
    flight += submitted(there, *range(place, 6))
    for future, leaf, seed in flight:
        assert_same(future.result(), leaf, here, seed)
    for _ in range(2):
        with pytest.raises(NonFiniteError):
            refused.result()
    assert anyway.stats(name).steps == 6


def test_steps_behind_a_refused_one_are_sent_under_a_new_epoch_if_their_stream_ends(
    anyway: gradbank.Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = anyway.open(name, memory()), memory()
    for future, leaf, seed in submitted(there, 0, 1):  # from here on there is room for several
        assert_same(future.result(), leaf, here, seed)
    refused = there.submit(torch.full((12, 16), torch.nan), batch(0)[1])
    behind = submitted(there, 2, 3)
    steps, epoch = there.producer._flight._steps, there.producer.tenure.epoch
    receive, answers = steps.receive, iter([True, False])  # type: ignore[union-attr]

    def cut(timeout: float) -> Any:
        if next(answers):
            return receive(timeout)
        raise ServerUnavailable("cut")

    monkeypatch.setattr(steps, "receive", cut)
    with pytest.raises(NonFiniteError):
        refused.result()
    for future, leaf, seed in (*behind, *submitted(there, 4)):
        assert_same(future.result(), leaf, here, seed)
    assert there.producer.tenure.epoch == epoch + 1
    assert anyway.stats(name).steps == 5
    assert anyway.stats(name).bank_rows == len(here)


def test_steps_behind_a_refused_one_enter_once_if_their_stream_ends_as_they_are_sent_again(
    anyway: gradbank.Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = anyway.open(name, memory()), memory()
    for future, leaf, seed in submitted(there, 0, 1):
        assert_same(future.result(), leaf, here, seed)
    refused = there.submit(torch.full((12, 16), torch.nan), batch(0)[1])
    behind = submitted(there, 2, 3)
    steps = there.producer._flight._steps
    assert steps is not None
    send, passed = steps.send, iter([True, False])

    def cut(*arguments: Any) -> None:
        if not next(passed):
            raise ServerUnavailable("cut")
        send(*arguments)

    monkeypatch.setattr(steps, "send", cut)
    with pytest.raises(NonFiniteError):
        refused.result()
    for future, leaf, seed in (*behind, *submitted(there, 4)):
        assert_same(future.result(), leaf, here, seed)
    assert anyway.stats(name).steps == 5
    assert anyway.stats(name).bank_rows == len(here)


def test_all_are_refused_by_name_where_all_are_wrong(anyway: gradbank.Client, name: str) -> None:
    there, here = anyway.open(name, memory()), memory()
    wrong = [there.submit(torch.full((4, 16), torch.inf), torch.arange(4)) for _ in range(4)]
    for future in wrong:
        with pytest.raises(NonFiniteError):
            future.result()
    leaf, labels = batch(0)
    assert_same(there(leaf, labels), leaf, here, 0)


def test_steps_in_shared_memory_survive_the_end_of_their_connection(name: str) -> None:
    settings = ServerSettings(port=0, metrics_port=-1, drain_seconds=1, shared_memory=True)
    with Server(settings) as running, gradbank.connect(running.address, timeout=20) as client:
        there, here, where = client.open(name, memory()), memory(), random.Random(0)
        waiting: list[Any] = []
        for seed in range(60):
            waiting += submitted(there, seed)
            if seed % 4 == 2:
                time.sleep(where.choice([0, 0.001, 0.004]))
                for connection in list(running._shared._open):  # type: ignore[union-attr]
                    connection.shutdown(socket.SHUT_RDWR)
            while len(waiting) > 3:
                future, leaf, of = waiting.pop(0)
                assert_same(future.result(), leaf, here, of)
        for future, leaf, of in waiting:
            assert_same(future.result(), leaf, here, of)
        assert client.via == "shm"
        assert client.stats(name).steps == 60
        assert torch.equal(there.local().embedding_memory, here.embedding_memory)


@pytest.mark.parametrize("via", ["tcp", "unix", "shm"])
def test_a_large_step_is_decoded_while_the_one_before_is_computed(
    nearby: Server, name: str, via: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, decoded, step, of = threading.Event(), threading.Semaphore(0), Session.step, Arrived.of

    def held_up(session: Session, rank: int, epoch: int, seq: int, *rest: Any) -> Any:
        assert seq != 3 or released.wait(20)
        return step(session, rank, epoch, seq, *rest)

    def seen(*args: Any) -> Arrived:
        decoded.release()
        return of(*args)

    monkeypatch.setattr(Session, "step", held_up)
    monkeypatch.setattr(Arrived, "of", seen)
    with gradbank.connect(nearby.address, timeout=30, via=via) as client:
        there, large = client.open(name, losses.ContrastiveLoss()), torch.randn(300, 1024)
        futures = [there.submit(large, torch.arange(300) % 7) for _ in range(4)]
        fourth = all(decoded.acquire(timeout=10) for _ in range(4))
        released.set()
        assert len({future.result().item() for future in futures}) == 1
    assert fourth, "the fourth step was not read while the third was computed"


def test_steps_in_flight_survive_cuts_and_are_carried_out_once(
    proxy: Any, far: gradbank.Client, near: gradbank.Client, name: str
) -> None:
    there, here, where = far.open(name, memory()), memory(), random.Random(0)
    waiting: list[tuple[StepFuture, Tensor, int]] = []
    for seed in range(60):
        if seed % 3 == 0:
            proxy.cut_after(where.choice([UP, DOWN]), where.randrange(1, 6000))
        waiting += submitted(there, seed)
        while len(waiting) > 3:
            future, leaf, of = waiting.pop(0)
            assert_same(future.result(), leaf, here, of)
    for future, leaf, of in waiting:
        assert_same(future.result(), leaf, here, of)
    proxy.spare()  # what was to be cut next
    assert near.stats(name).steps == 60
    assert proxy.cuts >= 10
    assert torch.equal(there.local().embedding_memory, here.embedding_memory)


@pytest.mark.parametrize(("direction", "counted"), [(DOWN, True), (UP, False)], ids=["carried out", "never arrived"])
@pytest.mark.parametrize("again", [True, False], ids=["the same", "others"])
def test_steps_in_doubt_are_settled(
    proxy: Any, far: gradbank.Client, near: gradbank.Client, name: str, direction: str, counted: bool, again: bool
) -> None:
    there, here = far.open(name, memory()), memory()
    leaf, labels = batch(0)
    assert_same(there(leaf, labels), leaf, here, 0)
    proxy.lose(direction)
    there.producer.timeout = 1.0
    for future, _, _ in submitted(there, 1, 2, 3):
        with pytest.raises((DeadlineExceeded, ServerUnavailable)):
            future.result()
    there.producer.timeout = 20.0
    proxy.cut()
    if not again and counted:
        for seed in (1, 2, 3):
            here(*batch(seed, 8 + 20 * (seed % 3)))
    for future, leaf, seed in submitted(there, *((1, 2, 3) if again else (4, 5))):
        assert_same(future.result(), leaf, here, seed)
    assert near.stats(name).steps == (4 if again else 3 + 3 * counted)


def test_one_thread_submits_while_another_waits(anyway: gradbank.Client, name: str) -> None:
    there, here = anyway.open(name, memory()), memory()
    waiting: list[Any] = []
    more = threading.Condition()

    def submit() -> None:
        for seed in range(40):
            made = submitted(there, seed)
            with more:
                waiting.extend(made)
                more.notify()

    thread = threading.Thread(target=submit)
    thread.start()
    for number in range(40):
        with more:
            more.wait_for(lambda number=number: len(waiting) > number, timeout=20)
        future, leaf, seed = waiting[number]
        assert_same(future.result(), leaf, here, seed)
    thread.join(20)


def test_a_loss_with_an_optimizer_is_called_and_not_submitted(anyway: gradbank.Client, name: str) -> None:
    head = anyway.open(name, losses.ArcFaceLoss(4, 16))
    leaf, labels = batch(0)
    with pytest.warns(UserWarning, match="nobody trains them here"):
        assert head.submit(leaf, labels).result().isfinite()
    head.optimizer("SGD", lr=0.1)
    with pytest.raises(InvalidRequest, match="is called, not submitted"):
        head.submit(leaf, labels)


def test_whether_a_loss_backpropagates_is_settled_when_it_is_submitted(anyway: gradbank.Client, name: str) -> None:
    there = anyway.open(name, losses.NTXentLoss())
    leaf, labels = batch(0)
    with torch.no_grad():
        silent = there.submit(leaf, labels)
    spoken = there.submit(leaf, labels)
    assert not silent.result().requires_grad
    with torch.no_grad():
        assert spoken.result().requires_grad
