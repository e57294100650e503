"""What is left behind: locks of an interrupted call, ranks of an ended session, clients that nobody closed."""

import gc
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import losses
from gradbank.errors import LimitExceeded, SessionNotFound
from gradbank.remote.stream import GrpcSteps
from gradbank_server.service import Server

from .conftest import serving, wait_until


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)), torch.arange(8) % 3


@pytest.mark.parametrize("via", ["tcp", "unix"])
def test_steps_go_on_where_a_call_was_interrupted_with_a_lock_of_grpcs(nearby: Server, name: str, via: Any) -> None:
    with gradbank.connect(nearby.address, timeout=15, via=via) as client:
        here, there = losses.NTXentLoss(), client.open(name, losses.NTXentLoss())
        there(*batch())
        taken, done = threading.Event(), threading.Event()
        condition = there.producer._flight._steps._call._state.condition  # type: ignore[union-attr]

        def hold() -> None:
            with condition:
                taken.set()
                done.wait(30)

        threading.Thread(target=hold, daemon=True).start()
        taken.wait(10)
        try:
            transport: Any = client._transport
            transport._renew(transport._now)  # as it does after Ctrl-C inside gRPC
            assert torch.equal(there(*batch(1)), here(*batch(1)))
            assert client.stats(name).steps == 2
        finally:
            done.set()


def test_every_rank_can_be_opened_again_once_its_session_ended(anyway: gradbank.Client, name: str) -> None:
    def opened(rank: int) -> gradbank.RemoteLoss:
        loss_fn = anyway.open(name, losses.ArcFaceLoss(3, 16), rank=rank)
        loss_fn.optimizer("SGD", lr=0.1)
        return loss_fn

    def trained(loss_fn: gradbank.RemoteLoss) -> None:
        embeddings, labels = batch()
        loss_fn(embeddings.requires_grad_(), labels).backward()
        loss_fn._optimizer.step()  # type: ignore[union-attr]

    ranks = [opened(rank) for rank in range(3)]
    for loss_fn in ranks:
        trained(loss_fn)
    held, anyway._open = anyway._open, {}
    anyway.close_session(name)  # as somebody else would
    anyway._open = held
    ranks[0] = opened(0)
    with pytest.raises(SessionNotFound, match="open it again"):
        trained(ranks[1])
    for rank in (1, 2):
        ranks[rank] = opened(rank)
        trained(ranks[rank])
    assert anyway.stats(name).steps == 2


@pytest.mark.parametrize("via", ["tcp", "shm"])
def test_a_client_that_is_dropped_gives_its_place_back(name: str, via: Any) -> None:
    with serving(max_streams=3) as running:
        for turn in range(9):

            def stepped(turn: int = turn) -> bool:
                client = gradbank.connect(running.address, timeout=20, via=via)
                try:
                    return bool(client.open(f"{name}-{turn}", losses.NTXentLoss())(*batch()).isfinite())
                except LimitExceeded:  # the server has yet to notice
                    gc.collect()
                    return False

            wait_until(stepped)
            gc.collect()


@pytest.mark.parametrize("via", ["tcp", "unix"])
def test_a_client_that_is_dropped_leaves_no_thread(nearby: Server, name: str, via: Any) -> None:
    for turn in range(4):
        before = set(threading.enumerate())
        client = gradbank.connect(nearby.address, timeout=20, via=via)
        assert client.open(f"{name}-{turn}", losses.NTXentLoss())(*batch()).isfinite()
        watching = [thread for thread in set(threading.enumerate()) - before if thread.name == "gradbank-watch"]
        assert watching
        del client
        gc.collect()
        wait_until(lambda watching=watching: not any(thread.is_alive() for thread in watching))


@pytest.mark.parametrize("via", ["tcp", "unix"])
def test_a_client_that_is_dropped_in_the_midst_of_a_lock_is_no_wait(nearby: Server, name: str, via: Any) -> None:
    """Python looks for cycles wherever it allocates, in the thread that watches the stream too."""
    client = gradbank.connect(nearby.address, timeout=20, via=via)
    there = client.open(name, losses.NTXentLoss())
    there(*batch())
    steps = there.producer._flight._steps
    assert isinstance(steps, GrpcSteps)
    with steps._watch._lock:
        steps.__del__()


FORKS = """
import gc, os, sys, time
import torch
import gradbank
from gradbank import losses

address, via, name = sys.argv[1:]
client = gradbank.connect(address, timeout=20, via=via)
held = [client.open(name, losses.NTXentLoss())]
rows, labels = torch.randn(8, 16), torch.arange(8) % 3
wanted = held[0](rows, labels)
steps = held[0].producer._flight._steps
child = os.fork()
if not child:
    held.clear()
    del client, steps
    gc.collect()
    time.sleep(0.3)  # for a thread beside, if there were one
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert torch.equal(held[0](rows, labels), wanted)
assert held[0].producer._flight._steps is steps, "the parent had to connect again"
client.close()
"""


@pytest.mark.parametrize("via", ["tcp", "unix", "shm"])
def test_a_forked_child_that_drops_the_client_leaves_the_parents_connection(
    nearby: Server, name: str, via: str
) -> None:
    words = [sys.executable, "-c", FORKS, nearby.address, via, name]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_what_is_watched_outlives_the_name_of_its_client(nearby: Server, name: str) -> None:
    with gradbank.connect(nearby.address, timeout=20) as client:
        client.open(name, losses.NTXentLoss())(*batch())
        watched = gradbank.connect(nearby.address, timeout=20).watch(name, 0.1)
        gc.collect()
        assert [next(watched).steps for _ in range(3)] == [1, 1, 1]
        watched.close()
