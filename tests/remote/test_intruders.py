"""Who speaks to a server through shared memory and means no good, or does not know how."""

import mmap
import os
import random
import secrets
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.errors import (
    GradbankError,
    InternalError,
    ServerUnavailable,
)
from gradbank.remote.shared import SharedSteps
from gradbank.remote.transport import answer_of
from gradbank.v1 import shared_pb2, step_pb2
from gradbank.wire import PACKET_BYTES, describe
from gradbank_server.service import Server

from .conftest import serving

PYTHON = Path("/usr/bin/python3")  # which other users may run
as_root = pytest.mark.skipif(
    os.geteuid() != 0 or not PYTHON.exists(), reason="only root can run a process as another user"
)


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
    held = shm.open(name, losses.NTXentLoss()).producer.tenure
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
        batch = torch.randn(8, 3), torch.arange(8) % 4
        assert torch.equal(client.open(name, losses.NTXentLoss())(*batch), losses.NTXentLoss()(*batch))


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
                steps._room = memoryview(b"x")  # as if it had been shared
                steps.send(step_pb2.StepInput(seq=1), [], 5)
            answer_of(steps, 1, 5)

        with pytest.raises(kind, match=told):
            exchange()
        steps.close()


def as_nobody(script: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Runs a script as a user without rights. It becomes one by itself: `subprocess` would have to fork this process
    for that, which gRPC's threads do not always survive."""
    become = "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    return subprocess.run(
        [str(PYTHON), "-I", "-c", become + script, *words], capture_output=True, text=True, timeout=60
    )


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
    made = as_nobody(script, place, str(os.getpid()))
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
        made = as_nobody(script, place)
        assert "only processes of the server" in made.stdout
        assert running.service.boot_id not in made.stdout
