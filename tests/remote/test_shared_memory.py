"""Trainers on the server's machine, through memory that it shares with them."""

import errno
import mmap
import os
import random
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    InternalError,
    InvalidRequest,
    LimitExceeded,
    NonFiniteError,
    ServerUnavailable,
)
from gradbank.remote.shared import SharedSteps
from gradbank.remote.transport import answer_of
from gradbank.v1 import shared_pb2, step_pb2
from gradbank.wire import PACKET_BYTES, describe
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings

from .conftest import wait_until

PYTHON = Path("/usr/bin/python3")  # which other users may run
as_root = pytest.mark.skipif(
    os.geteuid() != 0 or not PYTHON.exists(), reason="only root can run a process as another user"
)


def serving(**settings: object) -> Server:
    return Server(ServerSettings(port=0, metrics_port=-1, shared_memory=True, drain_seconds=1, **settings))


@pytest.fixture
def shm(nearby: Server) -> Iterator[gradbank.Client]:
    with gradbank.connect(nearby.address, timeout=20, via="shm") as client:
        yield client


@pytest.fixture
def place(shm: gradbank.Client) -> str:
    return shm.server().shared_memory_socket


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
    with pytest.raises(GradbankError, match=r"cannot be reached|shutting down|could not be reached"):
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
    with serving(max_shared_bytes=2**17) as running, gradbank.connect(running.address, timeout=5) as client:
        first, second = (client.open(f"{name}-{i}", losses.NTXentLoss()) for i in range(2))
        rows, labels = torch.randn(8, 4), torch.arange(8) % 2
        first(rows, labels)
        with pytest.raises(LimitExceeded, match=r"of the 131,072 that there may be 0 are free; .*--max-shared-bytes"):
            second(rows, labels)
        first.close()
        wait_until(lambda: running._shared._budget._left == 2**17)  # type: ignore[union-attr]
        second(rows, labels)


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


@contextmanager
def conversation(place: str) -> Iterator[socket.socket]:
    """A trainer of nobody's making, greeted by the server."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(20)
        connection.connect(place)
        assert shared_pb2.SharedResponse.FromString(connection.recv(PACKET_BYTES)).boot_id
        yield connection


def asked(connection: socket.socket, request: shared_pb2.SharedRequest) -> tuple[shared_pb2.SharedResponse, list[int]]:
    connection.send(request.SerializeToString())
    data, descriptors, _, _ = socket.recv_fds(connection, PACKET_BYTES, 2)
    return shared_pb2.SharedResponse.FromString(data), descriptors


def test_nobody_can_cut_the_memory_short_or_write_answers(place: str) -> None:
    with conversation(place) as connection:
        _, (steps, answers) = asked(
            connection, shared_pb2.SharedRequest(rooms=shared_pb2.Rooms(steps=9, answers=9, slots=1))
        )
        for each in (steps, answers):
            for size in (0, 2**30):
                with pytest.raises(PermissionError):
                    os.ftruncate(each, size)
        with pytest.raises(PermissionError):
            mmap.mmap(answers, 2**16)
        with pytest.raises(PermissionError):
            os.pwrite(answers, b"mine", 0)
        mmap.mmap(answers, 2**16, prot=mmap.PROT_READ).close()
        os.close(steps)
        os.close(answers)


def test_a_trainer_that_writes_while_its_step_is_under_way_gets_what_was_there_at_one_moment(
    shm: gradbank.Client, place: str, name: str
) -> None:
    held = shm.open(name, losses.NTXentLoss()).producer
    rows, labels = torch.full((512, 64), 3.0), torch.arange(512) % 4
    (first, data), (second, more) = describe(rows), describe(labels)
    step = step_pb2.StepInput(
        session=name, epoch=held.epoch, embeddings=first, labels=second, embeddings_need_gradient=True
    )
    step.payload_bytes = len(data) + len(more)
    over = threading.Event()
    with conversation(place) as connection:
        rooms = shared_pb2.Rooms(steps=step.payload_bytes, answers=len(data), slots=1)
        response, (steps, answers) = asked(connection, shared_pb2.SharedRequest(rooms=rooms))
        room = mmap.mmap(steps, response.rooms.steps)
        room[: step.payload_bytes] = bytes(data) + bytes(more)
        os.close(steps)
        os.close(answers)

        def scribble() -> None:
            bad, good = struct.pack("f", float("nan")), bytes(data[:4])
            while not over.wait(0.0003):
                room[1000:1004] = bad if room[1000:1004] == good else good

        threading.Thread(target=scribble, daemon=True).start()
        outcomes: set[str] = set()
        for _ in range(1000):
            if len(outcomes) == 2:
                break
            step.seq = held.last_seq + 1
            output = asked(connection, shared_pb2.SharedRequest(step=step))[0].step
            outcomes.add(output.error.type)
            if not output.HasField("error"):  # what was checked is what was computed with
                assert output.loss == output.loss
                held.last_seq += 1
        over.set()
    assert outcomes == {"", "NonFiniteError"}


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (shared_pb2.SharedRequest.FromString(b"\x18\x01"), "asks for nothing"),  # of a version to come
        (shared_pb2.SharedRequest(step=step_pb2.StepInput(seq=1)), "needs rooms of 0 and 0 bytes"),
        (shared_pb2.SharedRequest(step=step_pb2.StepInput(seq=1, payload_bytes=9)), "but its payload has 9"),
        (shared_pb2.SharedRequest(rooms=shared_pb2.Rooms(steps=2**63)), "where a step takes"),
        (shared_pb2.SharedRequest(rooms=shared_pb2.Rooms(answers=2**63)), "where a step takes"),
        (shared_pb2.SharedRequest(rooms=shared_pb2.Rooms(steps=9)), "1 to 4 slots, got 0"),
        (shared_pb2.SharedRequest(rooms=shared_pb2.Rooms(steps=9, slots=5)), "1 to 4 slots, got 5"),
    ],
    ids=["nothing", "no room", "no tensors", "a large room", "large answers", "no slot", "many slots"],
)
def test_a_request_that_cannot_be_is_refused_by_name(place: str, request_: shared_pb2.SharedRequest, told: str) -> None:
    with conversation(place) as connection:
        response, _ = asked(connection, request_)
        assert told in (response.error.message or response.step.error.message)


def test_a_step_larger_than_its_room_is_refused(place: str) -> None:
    message, data = describe(torch.zeros(200, 200))
    step = step_pb2.StepInput(seq=1, embeddings=message, payload_bytes=len(data), embeddings_need_gradient=True)
    for rooms in (None, shared_pb2.Rooms(steps=len(data), slots=1), shared_pb2.Rooms(answers=len(data), slots=1)):
        with conversation(place) as connection:
            if rooms is not None:
                for each in asked(connection, shared_pb2.SharedRequest(rooms=rooms))[1]:
                    os.close(each)
            response, _ = asked(connection, shared_pb2.SharedRequest(step=step))
            assert "needs rooms of 160,000 and 160,000 bytes" in response.error.message
            assert connection.recv(PACKET_BYTES) == b""  # the conversation is over


def test_packets_of_any_bytes_are_refused_and_the_server_lives(name: str) -> None:
    with serving(max_step_bytes=2**20) as running, gradbank.connect(running.address) as client:
        bombard(client.server().shared_memory_socket, name)
        assert_same(client.open(name, losses.NTXentLoss()), losses.NTXentLoss(), torch.randn(8, 3))


def bombard(place: str, name: str) -> None:
    chance = random.Random(0)
    message, data = describe(torch.zeros(4, 4))
    step = step_pb2.StepInput(session=name, seq=1, embeddings=message, payload_bytes=len(data))
    whole = [
        shared_pb2.SharedRequest(step=step).SerializeToString(),
        shared_pb2.SharedRequest(rooms=shared_pb2.Rooms(steps=70_000, answers=70_000, slots=2)).SerializeToString(),
    ]
    for _ in range(1500):
        packet = bytearray(chance.choice(whole))
        for _ in range(chance.randrange(1, 4)):
            packet[chance.randrange(len(packet))] = chance.randrange(256)
        with conversation(place) as connection:
            connection.send(bytes(packet[: chance.choice([len(packet), chance.randrange(1, len(packet))])]))
            data, descriptors, _, _ = socket.recv_fds(connection, PACKET_BYTES, 2)
            shared_pb2.SharedResponse.FromString(data)
            for each in descriptors:
                os.close(each)
    with conversation(place) as connection:
        connection.send(secrets.token_bytes(PACKET_BYTES + 1))
        assert "at most" in shared_pb2.SharedResponse.FromString(connection.recv(PACKET_BYTES)).error.message


@pytest.mark.parametrize(
    ("answer", "kind", "told"),
    [
        (b"", ServerUnavailable, "ended the connection"),
        (b"\xff\xff", InternalError, "cannot be read"),
        (shared_pb2.SharedResponse(rooms=shared_pb2.Rooms(steps=9)).SerializeToString(), InternalError, "no memory"),
        (shared_pb2.SharedResponse(step=step_pb2.StepOutput(seq=7)).SerializeToString(), InternalError, "of step 7"),
        (
            shared_pb2.SharedResponse(step=step_pb2.StepOutput(seq=1, payload_bytes=5)).SerializeToString(),
            InternalError,
            "longer than its memory",
        ),
    ],
    ids=["none", "no message", "no memory", "another's", "too long"],
)
def test_an_answer_that_is_none_is_an_error_by_name(
    tmp_path: Path, answer: bytes, kind: type[GradbankError], told: str
) -> None:
    path = str(tmp_path / "g")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.send(shared_pb2.SharedResponse(boot_id="b").SerializeToString())
                connection.recv(PACKET_BYTES)
                if answer:
                    connection.send(answer)

        threading.Thread(target=serve, daemon=True).start()
        steps = SharedSteps(path, "b", 5)
        message, data = describe(torch.zeros(2))

        def exchange() -> None:
            if "no memory" in told:
                steps.send(step_pb2.StepInput(seq=1, embeddings=message, payload_bytes=len(data)), [data], 5)
            else:
                steps.send(step_pb2.StepInput(seq=1), [], 5)
            answer_of(steps, 1, 5)

        with pytest.raises(kind, match=told):
            exchange()
        steps.close()


@as_root
def test_another_users_process_is_not_let_in_and_finds_no_memory(nearby: Server, place: str, shm: object) -> None:
    script = (
        "import glob, socket, sys\n"
        "try:\n"
        "    socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect(sys.argv[1])\n"
        "    sys.exit('let in')\n"
        "except PermissionError:\n"
        "    pass\n"
        "try:\n"
        "    glob.os.listdir(f'/proc/{sys.argv[2]}/fd')\n"
        "    sys.exit('saw descriptors')\n"
        "except PermissionError:\n"
        "    print('kept out')\n"
    )
    words = [str(PYTHON), "-I", "-c", script, place, str(os.getpid())]
    made = subprocess.run(words, user=65534, group=65534, extra_groups=[], capture_output=True, text=True, timeout=60)
    assert (made.stdout, made.stderr) == ("kept out\n", "")


@as_root
def test_another_users_process_is_refused_should_it_get_at_the_socket() -> None:
    with serving() as running, gradbank.connect(running.address) as client:
        place = client.server().shared_memory_socket
        os.chmod(Path(place).parent, 0o755)
        os.chmod(place, 0o666)
        script = (
            "import socket, sys\n"
            "connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            "connection.connect(sys.argv[1])\n"
            "print(connection.recv(65536))\n"
        )
        words = [str(PYTHON), "-I", "-c", script, place]
        made = subprocess.run(words, user=65534, group=65534, extra_groups=[], capture_output=True, text=True)
        assert "only processes of the server" in made.stdout
        assert running.service.boot_id not in made.stdout


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
