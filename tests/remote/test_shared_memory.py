"""Trainers on the server's machine, through memory that it shares with them."""

import errno
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import losses
from gradbank.errors import (
    DeadlineExceeded,
    GradbankError,
    InvalidRequest,
    LimitExceeded,
    NonFiniteError,
    ServerUnavailable,
)
from gradbank.remote.shared import SharedSteps
from gradbank.v1 import shared_pb2
from gradbank_server.service import Server
from gradbank_server.service.conversation import Conversation
from gradbank_server.settings import ServerSettings

from .conftest import serving, wait_until


def answers(client: gradbank.Client) -> bool:
    with suppress(GradbankError):
        client.server()
        return True
    return False


def assert_same(there: torch.nn.Module, here: torch.nn.Module, *embeddings: Tensor) -> None:
    leaves = [[each.clone().requires_grad_() for each in embeddings] for _ in range(2)]
    labels = torch.arange(len(embeddings[0])) % 4
    values = []
    for loss_fn, (first, *rest) in zip((there, here), leaves):
        ref = {"ref_emb": rest[0], "ref_labels": torch.arange(len(rest[0])) % 3} if rest else {}
        values.append(loss_fn(first, labels, **ref))
        values[-1].backward()
    assert torch.equal(*values)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(*leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_batches_of_all_sizes_are_the_local_ones_bit_for_bit(
    shm: gradbank.Client, name: str, dtype: torch.dtype
) -> None:
    there, here = shm.open(name, losses.NTXentLoss()), losses.NTXentLoss()
    generator = torch.Generator().manual_seed(0)
    for rows in (8, 300, 12, 1100, 0, 40):  # rooms grow, and hold less as well
        assert_same(there, here, torch.randn(rows, 96, generator=generator).to(dtype))
    assert_same(there, here, *(torch.randn(rows, 96, generator=generator).to(dtype) for rows in (5, 2000)))
    assert there.timings["network"] > 0


def test_connect_takes_the_fastest_way_there_is_and_tells(nearby: Server, server: Server) -> None:
    ways = {"auto": "shm", "shm": "shm", "unix": "unix", "tcp": "tcp"}
    for via, taken in ways.items():
        with gradbank.connect(nearby.address, via=via) as client:  # type: ignore[arg-type]
            assert repr(client) == f"Client({nearby.address!r}, via={taken!r})"
    with gradbank.connect(f"unix://{nearby.settings.unix_socket}") as client:
        assert client.via == "shm"
    with gradbank.connect(server.address) as client:
        assert client.via == "tcp"
        assert client.server().shared_memory_socket == client.server().unix_socket == ""
    with gradbank.connect("local://") as client:
        assert client.via == "local"


def test_a_way_that_is_not_offered_is_refused_with_what_to_do(nearby: Server, server: Server) -> None:
    for via, flag in (("shm", "--shared-memory"), ("unix", "--unix-socket")):
        with pytest.raises(InvalidRequest, match=f"not to this process: start the server with {flag}"):
            gradbank.connect(server.address, via=via)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="connect to host:port"):
        gradbank.connect(f"unix://{nearby.settings.unix_socket}", via="tcp")
    with pytest.raises(InvalidRequest, match="inside this process"):
        gradbank.connect("local://", via="shm")
    with pytest.raises(InvalidRequest, match="via must be auto, shm, unix or tcp, got 'rdma'"):
        gradbank.connect(server.address, via="rdma")  # type: ignore[arg-type]


def test_an_impostor_at_the_socket_is_not_spoken_to(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = str(tmp_path_factory.mktemp("s") / "g")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()

        def pose() -> None:
            with listener.accept()[0] as connection:
                connection.send(shared_pb2.SharedResponse(boot_id="mine").SerializeToString())

        threading.Thread(target=pose, daemon=True).start()
        with pytest.raises(ServerUnavailable, match="another server listens"):
            SharedSteps(path, "yours", 5)
    with pytest.raises(ServerUnavailable, match="cannot be reached through shared memory"):
        SharedSteps(path, "yours", 5)


def test_a_step_that_is_not_answered_in_time_is_answered_once_when_asked_again(name: str) -> None:
    with serving() as running, gradbank.connect(running.address, timeout=0.5) as client:
        there, rows = client.open(name, losses.CrossBatchMemory(losses.NTXentLoss(), 4, 32)), torch.randn(8, 4)
        turn = running.service.sessions[name]._turn
        free, held = threading.Event(), threading.Event()

        def hold() -> None:
            with turn:
                held.set()
                free.wait()

        threading.Thread(target=hold, daemon=True).start()
        held.wait()
        with pytest.raises(DeadlineExceeded, match="was not answered within 0"):
            there(rows, torch.arange(8) % 2)
        free.set()
        there(rows, torch.arange(8) % 2)
        assert client.via == "shm"
        assert client.stats(name).steps == 1


def test_what_is_wrong_with_a_step_is_told_and_the_next_one_is_well(shm: gradbank.Client, name: str) -> None:
    there = shm.open(name, losses.NTXentLoss())
    with pytest.raises(NonFiniteError):
        there(torch.full((4, 3), torch.nan), torch.arange(4) % 2)
    with pytest.raises(InvalidRequest, match="labels"):
        there(torch.randn(4, 3), torch.arange(5))
    assert_same(there, losses.NTXentLoss(), torch.randn(8, 3))
    assert shm.via == "shm"


def test_a_server_that_went_is_reached_again_in_the_way_it_then_offers(name: str) -> None:
    loss = losses.NTXentLoss()
    with serving() as running:
        port = running.port
        client, patient = gradbank.connect(running.address, timeout=10), gradbank.connect(running.address, 2, via="shm")
        there, insists = client.open(name, loss), patient.open(f"{name}-2", loss)
        there(torch.randn(8, 3), torch.arange(8) % 2)
    with pytest.raises(GradbankError, match=r"cannot be reached|shutting down|did not answer"):
        insists(torch.randn(8, 3), torch.arange(8) % 2)
    with Server(ServerSettings(port=port, metrics_port=-1, drain_seconds=1)), client:
        with pytest.raises(LookupError):  # its sessions went with it
            there(torch.randn(8, 3), torch.arange(8) % 2)
        assert client.via == "tcp"
        assert_same(client.open(name, loss), loss, torch.randn(8, 3))
        wait_until(lambda: answers(patient))
        insists = patient.open(f"{name}-3", loss)
        with pytest.raises(ServerUnavailable, match="shares no memory any more"):
            insists(torch.randn(8, 3), torch.arange(8) % 2)
        patient.close()


def test_memory_is_shared_up_to_the_budget_and_is_free_again_once_its_trainer_is_gone(name: str) -> None:
    with serving(max_shared_bytes=2**17) as running, gradbank.connect(running.address, 5, via="shm") as client:
        first, second = (client.open(f"{name}-{i}", losses.NTXentLoss()) for i in range(2))
        rows, labels = torch.randn(8, 4), torch.arange(8) % 2
        first(rows, labels)
        with pytest.raises(LimitExceeded, match=r"of the 131,072 that there may be 0 are free; .*--max-shared-bytes"):
            second(rows, labels)
        first.close()
        wait_until(lambda: running._shared._budget._left == 2**17)  # type: ignore[union-attr]
        second(rows, labels)


def test_what_the_server_rounded_up_may_be_asked_for_again(name: str) -> None:
    with (
        serving(max_step_bytes=16384) as running,
        gradbank.connect(running.address, timeout=20, via="shm") as client,
    ):
        there, here = client.open(name, losses.NTXentLoss()), losses.NTXentLoss()
        rows, labels = torch.randn(8, 16), torch.arange(8) // 2
        assert torch.equal(there(rows, labels), here(rows, labels))
        for future in [there.submit(rows, labels) for _ in range(3)]:
            assert torch.equal(future.result(), here(rows, labels))


def test_a_server_whose_places_are_taken_offers_shared_memory_nonetheless(name: str) -> None:
    with serving(max_streams=1) as running, gradbank.connect(running.address, timeout=20, via="tcp") as client:
        client.open(name, losses.NTXentLoss())(torch.randn(8, 16), torch.arange(8) // 2)
        with pytest.raises(LimitExceeded, match="all 1 streams are taken"):
            gradbank.connect(running.address, timeout=20, via="shm")


def test_what_does_not_fit_the_budget_goes_another_way_unless_one_insists(name: str) -> None:
    rows, labels = torch.randn(8, 4), torch.arange(8) % 2
    with serving(max_shared_bytes=2**17) as running, gradbank.connect(running.address, timeout=20) as client:
        first, second, third = (client.open(f"{name}-{i}", losses.NTXentLoss()) for i in range(3))
        wanted = first(rows, labels)
        assert client.via == "shm"
        assert torch.equal(second(rows, labels), wanted)
        assert client.via == "tcp"
        futures = [third.submit(rows, labels) for _ in range(6)]
        assert all(torch.equal(future.result(), wanted) for future in futures)
        assert torch.equal(first(rows, labels), wanted)  # as before
        assert [client.stats(f"{name}-{i}").steps for i in range(3)] == [2, 1, 6]


def test_steps_that_outgrow_the_budget_while_in_flight_go_another_way(name: str) -> None:
    with serving(max_shared_bytes=2**18) as running, gradbank.connect(running.address, timeout=20) as client:
        bank = losses.CrossBatchMemory(losses.NTXentLoss(), 64, 4096)
        there, here = client.open(name, bank.rebuilt()), bank
        futures, wanted = [], []
        for rows in (8, 8, 64, 512, 8, 512):
            batch = torch.randn(rows, 64), torch.arange(rows) % 4
            futures.append(there.submit(*batch))
            wanted.append(here(*batch))
        assert all(torch.equal(future.result(), value) for future, value in zip(futures, wanted, strict=True))
        assert client.stats(name).steps == 6
        assert client.via == "tcp"


def test_a_trainer_that_is_killed_in_the_middle_leaks_nothing(name: str) -> None:
    with serving() as running, gradbank.connect(running.address, timeout=10) as client:
        there = client.open(name, losses.NTXentLoss())
        there(torch.randn(8, 3), torch.arange(8) % 2)
        before = len(os.listdir("/proc/self/fd")), running._shared._budget._left  # type: ignore[union-attr]
        info = client.server()
        script = (
            "import os, sys, time\n"
            "from gradbank.remote.shared import SharedSteps\n"
            "from gradbank.v1.step_pb2 import StepInput\n"
            "steps = SharedSteps(*sys.argv[1:], 10)\n"
            "steps._ask_for(StepInput(payload_bytes=2**20), time.monotonic() + 10)\n"
            "steps._room[:4] = b'half'\n"
            "os.kill(os.getpid(), 9)\n"
        )
        for _ in range(3):
            words = [sys.executable, "-c", script, info.shared_memory_socket, info.boot_id]
            assert subprocess.run(words, timeout=60).returncode == -9
        wait_until(lambda: running._shared._budget._left == before[1])  # type: ignore[union-attr]
        wait_until(lambda: len(os.listdir("/proc/self/fd")) == before[0])
        there(torch.randn(8, 3), torch.arange(8) % 2)
        assert client.stats(name).steps == 2


def test_trainers_are_accepted_again_once_there_are_descriptors(name: str) -> None:
    class Exhausted:
        """A listener of which the first call fails, as it does in a process that has too many files open."""

        def __init__(self, listener: socket.socket) -> None:
            self.listener, self.failed = listener, 0

        def accept(self) -> object:
            if not self.failed:
                self.failed += 1
                raise OSError(errno.EMFILE, "Too many open files")
            return self.listener.accept()

        def shutdown(self, how: int) -> None:
            self.listener.shutdown(how)

    with Server(ServerSettings(port=0, metrics_port=-1, shared_memory=True)) as running:
        shared: Any = running._shared
        for turn in range(3):  # the first is accepted by the call that was under way before
            with gradbank.connect(running.address, timeout=20, via="shm") as client:
                client.open(f"{name}-{turn}", losses.NTXentLoss())(torch.randn(8, 4), torch.arange(8) // 2)
            if not turn:
                shared._listener = exhausted = Exhausted(shared._listener)
        assert exhausted.failed == 1


def test_what_a_killed_server_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def folder(name: str, age_s: float) -> tuple[Path, socket.socket]:
        made = tmp_path / name
        made.mkdir()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(made / "shared"))
        os.utime(made, (time.time() - age_s,) * 2)
        return made, listener

    folder("gradbank-left", 3600)[1].close()
    (starting, about_to), (alive, listening) = folder("gradbank-starting", 1), folder("gradbank-alive", 3600)
    other, ended = folder("somebody-else", 3600)
    listening.listen()
    with Server(ServerSettings(port=0, metrics_port=-1, shared_memory=True)) as running:
        own = Path(running._nearer.shared_memory_socket).parent
        assert set(tmp_path.iterdir()) == {starting, alive, other, own}
    assert set(tmp_path.iterdir()) == {starting, alive, other}
    for each in (about_to, listening, ended):
        each.close()


def test_no_thread_outlives_the_server(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has the sessions last, as Python ends, would let go of their tensors, which aborts the process."""
    hold = Conversation.hold

    def lingering(self: Conversation) -> None:
        try:
            hold(self)
        finally:
            time.sleep(0.3)

    monkeypatch.setattr(Conversation, "hold", lingering)
    before = set(threading.enumerate())
    with serving() as running, gradbank.connect(running.address, timeout=10, via="shm") as client:
        client.open(name, losses.NTXentLoss())(torch.randn(8, 3), torch.arange(8) % 2)
        assert [each for each in set(threading.enumerate()) - before if each.name == "gradbank-shared"]
    assert not [each for each in set(threading.enumerate()) - before if each.name == "gradbank-shared"]
