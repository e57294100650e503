"""A client ends every call in time, and says what is wrong; trainers of a session do not get in each other's way."""

import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.errors import (
    DeadlineExceeded,
    Fenced,
    GradbankError,
    InvalidComponent,
    InvalidRequest,
    ServerUnavailable,
    SessionConflict,
    SessionNotFound,
)

TIMEOUT = 1.5


def memory(rows: int = 100, temperature: float = 0.07) -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(temperature), 16, rows)


def batch(seed: int = 0, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 16, generator=made), torch.randint(0, 4, (rows,), generator=made)


def seconds(call: Callable[[], object], *errors: type[BaseException]) -> float:
    """How long a call took to fail."""
    begun = time.monotonic()
    with pytest.raises(errors):
        call()
    return time.monotonic() - begun


# -- deadlines --------------------------------------------------------------------------------------------------------


def stop(pid: int) -> None:
    """Stops a process, and waits until the last of its threads has stopped."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    while any((task / "stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.iterdir()):
        time.sleep(0.01)


def test_no_call_to_a_server_that_hangs_outlives_its_deadline(process: tuple[subprocess.Popen, str]) -> None:
    running, address = process
    with gradbank.connect(address, timeout=20) as client:
        there, arc = client.open("run", memory()), losses.ArcFaceLoss(4, 16)
        torch.optim.SGD(arc.parameters())  # the first optimizer of a process takes torch seconds
        expected = there(*batch())
        client.timeout = there.producer.timeout = TIMEOUT
        calls = {
            "step": lambda: there(*batch(1)),
            "stats": lambda: client.stats("run"),
            "sessions": client.sessions,
            "server": client.server,
            "catalog": client.catalog,
            "close": lambda: client.close_session("run"),
            "open": lambda: client.open("other", memory()),
            "open with weights": lambda: client.open("third", arc),
            "optimizer": lambda: there.optimizer("SGD", lr=0.1),
            "pull": there.local,
            "watch": lambda: next(client.watch("run", 0.05)),
        }
        stop(running.pid)
        try:
            took = {name: seconds(_in_time(call), DeadlineExceeded, ServerUnavailable) for name, call in calls.items()}
        finally:
            os.kill(running.pid, signal.SIGCONT)
        assert {name: each for name, each in took.items() if each > TIMEOUT + 1} == {}
        client.timeout = there.producer.timeout = 20
        assert torch.equal(there(*batch(1)), _local(2)), "the step that timed out is asked for again"
        assert expected.item() == pytest.approx(_local(1).item())


def _local(steps: int) -> torch.Tensor:
    here = memory()
    return [here(*batch(seed)) for seed in range(steps)][-1]


def _in_time(call: Callable[[], object]) -> Callable[[], object]:
    """The call, in a thread that is left to itself if it hangs."""

    def guarded() -> object:
        ended: queue.SimpleQueue[object] = queue.SimpleQueue()

        def run() -> None:
            try:
                ended.put(call())
            except Exception as error:
                ended.put(error)

        threading.Thread(target=run, daemon=True).start()
        try:
            result = ended.get(timeout=TIMEOUT + 1.5)
        except queue.Empty:
            raise DeadlineExceeded("it hung") from None
        if isinstance(result, Exception):
            raise result
        return result

    return guarded


def test_no_call_to_a_server_that_is_gone_outlives_its_deadline(process: tuple[subprocess.Popen, str]) -> None:
    running, address = process
    with gradbank.connect(address, timeout=20) as client:
        there = client.open("run", memory())
        there(*batch())
        client.timeout = there.producer.timeout = TIMEOUT
        running.kill()
        running.wait()
        assert TIMEOUT - 0.1 < seconds(lambda: there(*batch(1)), ServerUnavailable) < TIMEOUT + 1  # it kept trying
        for call in (lambda: client.stats("run"), client.sessions, lambda: next(client.watch("run")), there.local):
            assert seconds(call, ServerUnavailable) < TIMEOUT + 1


def test_connecting_to_nothing_fails_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert seconds(lambda: gradbank.connect(f"127.0.0.1:{port}", 1), DeadlineExceeded, ServerUnavailable) < 2.5
    assert seconds(lambda: gradbank.connect(f"127.0.0.1:{port}", 2), ServerUnavailable) < 3


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "an address is host:port, unix:///path or local://, got ''"),
        ("localhost", "an address is host:port, unix:///path or local://, got 'localhost'"),
        ("localhost:", "an address is host:port"),
        (":50051", "an address is host:port"),
        ("localhost:http", "an address is host:port"),
        ("http://localhost:50051", "needs a transport that is not installed; use host:port"),
        ("local://tpu", "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("local://cuda:99", r"CUDA devices"),
    ],
)
def test_an_address_that_cannot_be_is_refused(address: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        gradbank.connect(address)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_that_cannot_be_is_refused(timeout: float) -> None:
    with pytest.raises(InvalidRequest, match="timeout must be above 0 seconds"):
        gradbank.connect("local://", timeout)


def test_no_proxy_is_asked_the_way_to_this_machine(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    for host in ("127.0.0.1", "localhost"):
        with gradbank.connect(f"{host}:{server.port}", timeout=10) as client:
            assert client.sessions() is not None


def test_a_closed_client_says_so(either: gradbank.Client, name: str) -> None:
    there = either.open(name, memory())
    there(*batch())
    either.close()
    for call in (lambda: there(*batch(1)), either.sessions, lambda: next(either.watch(name)), there.local):
        there.producer.timeout = 1
        with pytest.raises(ServerUnavailable, match="was closed"):
            call()
    either.close()


def test_closing_a_client_whose_session_is_gone_is_no_error(either: gradbank.Client, name: str) -> None:
    there = either.open(name, losses.ArcFaceLoss(4, 16))
    optimizer = there.optimizer("SGD", lr=0.1)
    there(*batch()).backward()
    optimizer.step()
    either.close_session(name)
    either.close()
    with pytest.raises(ServerUnavailable):
        either.sessions()


# -- trainers of one session ------------------------------------------------------------------------------------------


def test_the_older_of_two_trainers_of_a_rank_is_fenced(either: gradbank.Client, name: str) -> None:
    older = either.open(name, memory())
    older(*batch())
    newer = either.open(name, memory())
    assert (older.created, newer.created) == (True, False)
    newer(*batch(1))
    with pytest.raises(Fenced, match="another trainer took over rank 0"):
        older(*batch(2))
    newer(*batch(2))
    assert either.stats(name).steps == 3


def test_two_ranks_share_one_bank(either: gradbank.Client, name: str) -> None:
    ranks, here = [either.open(name, memory(), rank) for rank in (0, 1)], memory()
    for seed in range(6):
        assert torch.equal(ranks[seed % 2](*batch(seed)), here(*batch(seed)))
    assert [(s.ranks, s.steps) for s in either.sessions() if s.name == name] == [((0, 1), 6)]


def test_a_second_trainer_with_another_loss_is_told_the_difference(either: gradbank.Client, name: str) -> None:
    first = either.open(name, memory())
    with pytest.raises(SessionConflict, match=r"loss.temperature is 0.07 there, and 0.1 here"):
        either.open(name, memory(temperature=0.1))
    first(*batch())
    assert either.stats(name).bank_rows == 8


@pytest.mark.parametrize("interval", [1e10, float("inf")])
def test_watch_may_look_as_seldom_as_it_likes(either: gradbank.Client, name: str, interval: float) -> None:
    either.open(name, losses.NTXentLoss())
    assert next(either.watch(name, interval)).steps == 0


@pytest.mark.parametrize("interval", [float("nan"), 0.0, -1e9])
def test_but_not_at_no_interval(either: gradbank.Client, name: str, interval: float) -> None:
    either.open(name, losses.NTXentLoss())
    with pytest.raises(InvalidRequest, match=r"interval_s must be at least 0\.05"):
        next(either.watch(name, interval))


def test_watch_tells_until_the_session_ends(either: gradbank.Client, name: str) -> None:
    there = either.open(name, memory())
    watched = either.watch(name, interval=0.05)
    assert next(watched).steps == 0
    there(*batch())
    assert next(each for each in watched if each.steps).bank_rows == 8
    either.close_session(name)
    assert all(each.steps == 1 for each in watched)  # and so it ends
    assert len(list(zip(range(2), either.watch(either.open(name, memory()).name, interval=0.05)))) == 2


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda client: client.stats("nobody"), SessionNotFound, "no session is called 'nobody'"),
        (lambda client: next(client.watch("nobody")), SessionNotFound, "no session is called 'nobody'"),
        (lambda client: next(client.watch("nobody", 0.01)), InvalidRequest, "interval_s must be at least 0.05"),
        (lambda client: client.open("a/b", memory()), InvalidRequest, "a session's name has letters"),
        (lambda client: client.open("x", torch.nn.MSELoss()), InvalidRequest, "got torch.nn.modules.loss.MSELoss"),
        (lambda client: client.open("x", memory(2**70)), InvalidComponent, "memory_size"),
        (lambda client: client.open("x", memory(), rank=-1), InvalidRequest, "rank"),
    ],
)
def test_errors_are_the_same_behind_either_transport(
    either: gradbank.Client, call: Callable[[gradbank.Client], object], error: type[GradbankError], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(either)
