"""A trainer that is interrupted, or late, goes on from where it was."""

import signal
import time
from types import FrameType
from typing import Any

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.errors import InvalidRequest, InvalidUpdate
from gradbank.remote.flight import Flight
from gradbank.remote.ticket import NO_NEWS
from gradbank.v1 import step_pb2
from gradbank.wire import describe
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings


def batch(seed: int, rows: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 16, generator=generator).requires_grad_(), torch.arange(rows) % 8


class Interrupted(BaseException):
    """As Ctrl-C would raise."""


class Once:
    """A lock that is interrupted as it is taken."""

    def __init__(self, flight: Flight) -> None:
        self._flight, self._lock = flight, flight._lock

    def __enter__(self) -> None:
        self._flight._lock = self._lock
        raise Interrupted

    def __exit__(self, *_: object) -> None:
        raise AssertionError("it was not taken")


def test_what_follows_an_interrupt_is_not_the_answer_before_it(client: gradbank.Client, name: str) -> None:
    """A long step is interrupted while its answer is awaited; the next step must get its own."""
    bank = losses.CrossBatchMemory(losses.TripletMarginLoss(), 16, 8192)
    for seed in range(4):
        bank.add_to_memory(*batch(seed, 2048))
    there, here = client.open(name, bank), bank

    def interrupt(_: int, __: FrameType | None) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupted):
            there(*batch(10, 2048))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # by now the server has carried the step out, or never will; either way the next answers are its own
    answers = [there(*batch(seed)) for seed in (11, 12)]
    if client.stats(name).steps == 3:
        here.add_to_memory(*batch(10, 2048))
    for answer, seed in zip(answers, (11, 12)):
        assert torch.equal(answer, here(*batch(seed)))


@pytest.mark.parametrize("via", ["tcp", "shm"])
def test_a_stream_is_ended_that_was_just_made_as_the_interrupt_came(name: str, via: Any) -> None:
    settings = ServerSettings(port=0, metrics_port=-1, max_streams=4, shared_memory=True, drain_seconds=1)
    with Server(settings) as small, gradbank.connect(small.address, timeout=10, via=via) as client:
        there = client.open(name, losses.NTXentLoss())
        there(*batch(0))
        flight = there.producer._flight
        for seed in range(1, 7):
            there.close()
            flight._lock = Once(flight)  # taken to keep the stream that was made
            with pytest.raises(Interrupted):
                there(*batch(seed))
        there(*batch(7))


def trained(
    client: gradbank.Client, name: str, **options: float
) -> tuple[gradbank.RemoteLoss, gradbank.RemoteOptimizer]:
    head = client.open(name, losses.ArcFaceLoss(8, 16))
    return head, head.optimizer("SGD", **options)


def test_a_backward_that_comes_too_late_is_refused_where_it_is_called(client: gradbank.Client, name: str) -> None:
    head, optimizer = trained(client, name, lr=0.1)
    waiting = [head(*batch(seed)) for seed in range(6)]
    with pytest.raises(InvalidRequest, match="at most 3 losses later"):
        waiting[0].backward()
    waiting[5].backward()
    optimizer.step()
    head(*batch(7))  # and nothing is left over that the server would refuse
    assert client.stats(name).optimizer_steps == 1


def test_a_second_backward_is_refused_where_it_is_called(client: gradbank.Client, name: str) -> None:
    head, _ = trained(client, name, lr=0.1)
    loss = head(*batch(0))
    loss.backward(retain_graph=True)
    with pytest.raises(InvalidRequest, match="may be called once"):
        loss.backward()
    head(*batch(1))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e38])
def test_weights_that_would_not_be_finite_are_refused_once(client: gradbank.Client, name: str, scale: float) -> None:
    head, optimizer = trained(client, name, lr=1e10)
    before = head.local().state_dict()["W"]
    (head(*batch(0)) * scale).backward()
    optimizer.step()
    with pytest.raises(InvalidUpdate, match="infinite or NaN"):
        head.flush()
    optimizer.zero_grad()
    head(*batch(1))  # the refused step was dropped, and training goes on
    assert torch.equal(head.local().state_dict()["W"], before)


def test_closing_a_client_closes_every_loss_and_then_tells_what_failed(server: object, name: str) -> None:
    client = gradbank.connect(server.address)  # type: ignore[attr-defined]
    bad, bad_optimizer = trained(client, f"{name}-bad", lr=1e30)
    good, good_optimizer = trained(client, f"{name}-good", lr=0.1)
    for head, optimizer, scale in ((bad, bad_optimizer, 1e30), (good, good_optimizer, 1.0)):
        (head(*batch(0)) * scale).backward()
        optimizer.step()
    with pytest.raises(InvalidUpdate):
        client.close()
    with gradbank.connect(server.address) as again:  # type: ignore[attr-defined]
        assert again.stats(f"{name}-good").optimizer_steps == 1
        assert again.stats(f"{name}-bad").optimizer_steps == 0


def test_a_queue_takes_no_references_from_any_client(embedded: gradbank.Client, name: str) -> None:
    """The Python client has no such argument; a message from elsewhere may have it."""
    there = embedded.open(name, losses.CrossBatchMemory(losses.NTXentLoss(), 16, 64))
    embeddings, labels = batch(0)
    step, payload = step_pb2.StepInput(), []
    for field, tensor in (("embeddings", embeddings), ("labels", labels), ("ref_labels", labels)):
        message, data = describe(tensor)
        getattr(step, field).CopyFrom(message)
        payload.append(data)
    deadline = there.producer.deadline()
    with pytest.raises(InvalidRequest, match="takes no ref_emb or ref_labels"):
        there.producer.result(there.producer.submit(step, payload, NO_NEWS, deadline), deadline)
    assert there(embeddings, labels).isfinite()


def test_a_deadline_that_passed_with_the_answer_does_not_fail_the_next_step(client: gradbank.Client, name: str) -> None:
    there, here = client.open(name, losses.NTXentLoss()), losses.NTXentLoss()
    there(*batch(0))
    steps = there.producer._flight._steps
    with steps._watch.until(time.monotonic()):  # type: ignore[union-attr]
        time.sleep(0.2)
    assert steps._watch.ended  # type: ignore[union-attr]
    assert torch.equal(there(*batch(1)), here(*batch(1)))
