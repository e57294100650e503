"""What a trainer's process or its server may do at a moment that does not suit."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import losses
from gradbank.errors import InternalError, NonFiniteError, ServerUnavailable, SessionNotFound
from gradbank.memory import CrossBatchMemory
from gradbank.remote.doubts import Doubts
from gradbank_server.service import Server, service
from gradbank_server.settings import ServerSettings

from .conftest import DOWN

D = 8


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, D, generator=generator), torch.arange(12) % 4


def memory() -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(), D, 30)


@pytest.fixture
def elsewhere() -> Iterator[None]:
    before = torch.get_default_device()
    yield
    torch.set_default_device(before)


def test_a_default_device_is_not_that_of_what_was_sent(anyway: gradbank.Client, name: str, elsewhere: None) -> None:
    here, there = memory(), anyway.open(name, memory())
    drawn = [batch(seed) for seed in range(3)]
    wanted = [here(*each) for each in drawn]
    torch.set_default_device("meta")  # which no number can be read from
    made = [there(*each) for each in drawn]
    copy = there.local()
    torch.set_default_device("cpu")
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    assert torch.equal(copy.embedding_memory, here.embedding_memory)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Which of the answers that the server makes it fails to, by number: their steps are carried out nonetheless."""
    real, numbers, made = service.answer_message, set[int](), iter(range(1000))

    def fails(*arguments: Any) -> Any:
        if next(made) in numbers:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(service, "answer_message", fails)
    return numbers


@pytest.mark.parametrize("asks_again", [False, True])
def test_after_a_fault_behind_a_step_the_trainer_goes_on(
    anyway: gradbank.Client, name: str, failing: set[int], asks_again: bool
) -> None:
    here, there = memory(), anyway.open(name, memory())
    failing |= set(range(1, 1000))
    assert torch.equal(there(*batch(0)), here(*batch(0)))
    there.producer.timeout = 1
    with pytest.raises(ServerUnavailable, match="calling again with the same batch is safe"):
        there(*batch(1))
    there.producer.timeout = 20
    failing.clear()
    wanted = here(*batch(1))
    if asks_again:  # and is answered from store: the batch enters the bank once
        assert torch.equal(there(*batch(1)), wanted)
    for seed in (2, 3):
        assert torch.equal(there(*batch(seed)), here(*batch(seed)))
    assert anyway.stats(name).steps == 4


@pytest.mark.parametrize("fails", [{2}, {2, 3}, {4, 5}, {1, 3, 7}], ids=str)
def test_the_answer_that_a_server_failed_to_make_is_asked_for_again(
    anyway: gradbank.Client, name: str, failing: set[int], fails: set[int]
) -> None:
    here, there = memory(), anyway.open(name, memory())
    failing |= fails
    flight = [there.submit(*batch(seed)) for seed in range(7)]
    for seed, future in enumerate(flight):
        assert torch.equal(future.result(), here(*batch(seed)))
    assert anyway.stats(name).steps == 7


def test_a_step_refused_behind_a_fault_does_not_take_its_number(
    anyway: gradbank.Client, name: str, failing: set[int]
) -> None:
    here, there = memory(), anyway.open(name, memory())
    failing.add(1)
    assert torch.equal(there(*batch(0)), here(*batch(0)))
    faulty, refused = there.submit(*batch(1)), there.submit(torch.full((12, D), torch.nan), batch(1)[1])
    behind = [there.submit(*batch(seed)) for seed in (2, 3)]
    with pytest.raises(NonFiniteError):
        refused.result()
    for seed, future in enumerate([faulty, *behind], 1):
        assert torch.equal(future.result(), here(*batch(seed)))
    assert anyway.stats(name).steps == 4


def test_a_fault_before_a_step_is_told_and_nothing_is_changed(
    anyway: gradbank.Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = memory(), anyway.open(name, memory())
    assert torch.equal(there(*batch(0)), here(*batch(0)))
    with monkeypatch.context() as patch:
        patch.setattr(CrossBatchMemory, "stage", None)
        with pytest.raises(InternalError, match="asking again is safe"):
            there(*batch(1))
    for seed in (1, 2):
        assert torch.equal(there(*batch(seed)), here(*batch(seed)))
    assert anyway.stats(name).steps == 3


def test_a_trainer_in_doubt_does_not_go_on_in_a_new_session_of_that_name() -> None:
    with Server(ServerSettings(port=0, metrics_port=-1, drain_seconds=1)) as first:
        port, client = first.port, gradbank.connect(first.address, timeout=1)
        there = client.open("run", memory(), rank=0)
        there(*batch(0))
    with pytest.raises(ServerUnavailable):
        there(*batch(1))
    settings = ServerSettings(port=port, metrics_port=-1, drain_seconds=1)
    with Server(settings) as second, gradbank.connect(second.address, timeout=10) as other:
        fresh = other.open("run", memory(), rank=1)
        with pytest.raises(SessionNotFound, match="another has its name now: open it again"):
            there(*batch(2))
        fresh(*batch(0))
        assert other.stats("run").steps == 1
    client.close()


def test_a_future_that_two_threads_ask_is_one_loss(client: gradbank.Client, name: str) -> None:
    there = client.open(name, losses.NTXentLoss())
    for seed in range(20):
        embeddings, labels = batch(seed)
        future, made = there.submit(embeddings.requires_grad_(), labels), list[Tensor]()
        threads = [threading.Thread(target=lambda f=future, m=made: m.append(f.result())) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join(20)
        assert len(made) == 4
        assert all(each is made[0] for each in made)


WATCHES = """
import sys, torch, gradbank
from gradbank import losses
client = gradbank.connect(sys.argv[1], via="tcp")
loss_fn = client.open("watched", losses.NTXentLoss())
loss_fn(torch.randn(8, 4), torch.arange(8) % 2)
watching = client.watch("watched", 5.0)
next(watching)
"""


def test_a_script_that_still_watches_can_end(client: gradbank.Client) -> None:
    for _ in range(6):  # it used to hang in every second or third run
        done = subprocess.run(
            [sys.executable, "-c", WATCHES, client.address], timeout=30, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    client.close_session("watched")


def test_a_client_keeps_one_loss_of_a_session_and_rank(anyway: gradbank.Client, name: str) -> None:
    for _ in range(20):
        there = anyway.open(name, losses.NTXentLoss())
        there(*batch(0))
    anyway.open(name, losses.NTXentLoss(), rank=1)
    assert len(anyway._open) == 2
    anyway.close_session(name)
    assert anyway._open == {}


FORKS = """
import os, sys, torch, gradbank
from gradbank import losses
client = gradbank.connect(sys.argv[1], via="shm")
loss_fn = client.open(sys.argv[2], losses.NTXentLoss())
batch = torch.randn(8, 4), torch.arange(8) % 2
loss_fn(*batch)
steps = loss_fn.producer._flight._steps
child = os.fork()
if child == 0:
    loss_fn.close()
    try:
        client.close_session(sys.argv[2])
    except gradbank.errors.ForkedClient:
        os._exit(0)
    os._exit(1)
assert os.waitpid(child, 0)[1] == 0
loss_fn(*batch)
assert loss_fn.producer._flight._steps is steps, "the child cut its parent's stream"
"""


def test_a_forked_child_does_not_close_what_is_its_parents(nearby: Server, name: str) -> None:
    words = [sys.executable, "-W", "ignore", "-c", FORKS, nearby.address, name]
    done = subprocess.run(words, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FORKS_WHILE_ANOTHER_WAITS = """
import os, sys, threading, time, torch, gradbank
from gradbank import losses
client = gradbank.connect("local://")
loss_fn = client.open("run", losses.NTXentLoss())
batch = torch.randn(8, 4), torch.arange(8) % 2
future = loss_fn.submit(*batch)
answered = threading.Event()
loss_fn.producer.result = lambda *_: answered.wait()
threading.Thread(target=future.result, daemon=True).start()
while not future._asking.locked():
    time.sleep(0.01)
child = os.fork()
if child == 0:
    try:
        future.result()
    except gradbank.errors.ForkedClient:
        os._exit(0)
    os._exit(1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_child_forked_while_another_thread_waits_is_refused() -> None:
    words = [sys.executable, "-W", "ignore", "-c", FORKS_WHILE_ANOTHER_WAITS]
    done = subprocess.run(words, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_to_open_a_loss_again_loses_no_step_of_its_optimizer(anyway: gradbank.Client, name: str) -> None:
    here = losses.ArcFaceLoss(4, D)
    there = anyway.open(name, here)
    far, own = there.optimizer("SGD", lr=0.5), torch.optim.SGD(here.parameters(), lr=0.5)
    for loss_fn, optimizer in ((there, far), (here, own)):
        loss_fn(*batch(0)).backward()
        optimizer.step()
    assert torch.equal(anyway.open(name, here)(*batch(1)), here(*batch(1)))


def test_an_interrupt_while_a_step_is_given_up_loses_nothing(
    proxy: Any, near: gradbank.Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the step, nor the optimizer's that it tells of."""
    append, interrupts = Doubts.append, [KeyboardInterrupt]

    def interrupted(*args: Any, **more: Any) -> None:
        if interrupts:
            raise interrupts.pop()
        append(*args, **more)

    with gradbank.connect(proxy.address, timeout=20) as client:
        here = losses.ArcFaceLoss(4, D)
        there = client.open(name, here)
        far, own = there.optimizer("SGD", lr=0.5), torch.optim.SGD(here.parameters(), lr=0.5)
        for loss_fn, optimizer in ((there, far), (here, own)):
            loss_fn(*batch(0)).backward()
            optimizer.step()
        there.producer.timeout = 1
        proxy.lose(DOWN)
        monkeypatch.setattr(Doubts, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            there(*batch(1))
        there.producer.timeout = 20
        proxy.cut()
        assert torch.equal(there(*batch(1)), here(*batch(1)))
        assert torch.equal(there(*batch(2)), here(*batch(2)))
        assert near.stats(name).optimizer_steps == 1
        assert near.stats(name).steps == 3
