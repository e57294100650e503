"""Steps through shared memory, for trainers of the server's user on its machine; see shared.proto."""

import os
import shutil
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import structlog
from google.protobuf.message import DecodeError

from gradbank.errors import GradbankError, InvalidRequest, LimitExceeded
from gradbank.v1 import shared_pb2, step_pb2
from gradbank.wire import PACKET_BYTES, WINDOW, assembled, error_message, gradient_bytes
from gradbank_server.service.ahead import Ahead
from gradbank_server.service.faults import fault
from gradbank_server.service.gate import Gate
from gradbank_server.service.room import Budget, Room, check_shareable
from gradbank_server.service.service import Service
from gradbank_server.service.steps import Arrived

log = structlog.get_logger()

_PREFIX = "gradbank-"
_FRESH_S = 60.0  # for so long a server may be about to listen
_PAUSE_S = 0.1  # before a trainer is accepted again
_CREDENTIALS = struct.Struct("3i")  # of struct ucred: process, user, group


class SharedMemory:
    """Listens on a socket in a folder that only the server's user may enter, from `start` to `stop`.

    Args:
        max_bytes: how much all trainers may share with the server, together.

    Raises:
        InvalidRequest: a system that cannot do this.
    """

    def __init__(self, service: Service, gate: Gate, max_bytes: int) -> None:
        check_shareable()
        self._service, self._gate, self._budget = service, gate, Budget(max_bytes)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._folder = ""
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def start(self) -> str:
        """The path of the socket."""
        _remove_left_behind(Path(tempfile.gettempdir()))
        self._folder = tempfile.mkdtemp(prefix=_PREFIX)  # of mode 0700
        path = str(Path(self._folder, "shared"))
        try:
            self._listener.bind(path)
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise OSError(f"cannot listen for shared memory at {path}: {error}; set TMPDIR to another folder") from None
        self._listener.listen(64)
        threading.Thread(target=self._accept, name="gradbank-shared", daemon=True).start()
        return path

    def stop(self) -> None:
        """Ends every connection; the gate has seen to it that no step is under way."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with self._lock:
            for each in (self._listener, *self._open):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with self._listener:
            while not self._gate.closing.is_set():
                try:
                    connection, _ = self._listener.accept()
                except OSError as error:  # stopped; or there are no more descriptors, and soon may be again
                    if not self._gate.closing.wait(_PAUSE_S):
                        log.warning("cannot accept a trainer to shared memory", error=str(error))
                    continue
                threading.Thread(target=self._serve, args=(connection,), name="gradbank-shared", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            with self._lock:
                self._open.add(connection)
            try:
                with self._gate.stream():
                    self._check_user(connection)
                    _Conversation(self._service, self._gate, self._budget, connection).hold()
            except GradbankError as error:
                _say(connection, shared_pb2.SharedResponse(error=error_message(error)))
            except OSError:
                pass  # the trainer went away
            except Exception as error:
                _say(connection, shared_pb2.SharedResponse(error=error_message(fault(error))))
            finally:
                with self._lock:
                    self._open.discard(connection)
                with suppress(OSError):  # the trainer may have ended it
                    connection.shutdown(socket.SHUT_RDWR)  # which wakes a thread that reads ahead, as closing does not

    def _check_user(self, connection: socket.socket) -> None:
        """Refuses the processes of other users, should they get at the socket."""
        told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        process, user, _ = _CREDENTIALS.unpack(told)
        if user != os.geteuid():
            log.warning("refused another user's process", process=process, user=user)
            raise InvalidRequest("only processes of the server's own user may share memory with it")


class _Conversation:
    """One trainer's steps, one after the other."""

    def __init__(self, service: Service, gate: Gate, budget: Budget, connection: socket.socket) -> None:
        self._service, self._gate, self._budget, self._connection = service, gate, budget, connection
        self._steps: Room | None = None
        self._answers: Room | None = None
        self._taken = self._answered = 0  # how many steps, in these rooms

    def hold(self) -> None:
        """Answers until the trainer goes away, and lets go of the memory."""
        self._send(shared_pb2.SharedResponse(boot_id=self._service.boot_id))
        try:
            with closing(Ahead(self._arriving())) as requests:
                for request in requests:
                    self._gate.check()
                    if isinstance(request, shared_pb2.Rooms):
                        self._make_rooms(request)
                        continue
                    if request.next_is_worth_reading:
                        requests.read()
                    self._answer(request)
                    del request  # before the next one comes, for it may be large
        finally:
            self._leave_rooms()

    def _arriving(self) -> Iterator[Arrived | shared_pb2.Rooms]:
        """What the trainer asks for. Rooms are made by who takes in what comes from here, for a step may use them."""
        packet = bytearray(PACKET_BYTES + 1)
        while size := self._connection.recv_into(packet):
            at = time.perf_counter()
            request = _read(packet, size)
            match request.WhichOneof("request"):
                case "step":
                    yield self._arrived(request.step, at)
                case "rooms":
                    yield request.rooms
                case None:
                    raise InvalidRequest("a request asks for nothing: set rooms or step")

    def _make_rooms(self, asked: shared_pb2.Rooms) -> None:
        self._leave_rooms()
        limit = self._service.settings.max_step_bytes
        if max(asked.steps, asked.answers) > 2 * limit:  # gradients of half precision are twice as long
            raise LimitExceeded(f"rooms of {asked.steps:,} and {asked.answers:,} bytes, where a step takes {limit:,}")
        if not 1 <= asked.slots <= WINDOW:
            raise InvalidRequest(f"rooms have 1 to {WINDOW} slots, got {asked.slots}")
        sizes = [_rounded(asked.steps), _rounded(asked.answers)]
        self._budget.take(sum(sizes) * asked.slots)
        made: list[Room] = []
        try:
            for size, read_only in zip(sizes, (False, True)):
                made.append(Room(size, asked.slots, read_only))
            rooms = shared_pb2.Rooms(steps=sizes[0], answers=sizes[1], slots=asked.slots)
            response = shared_pb2.SharedResponse(rooms=rooms)
            descriptors = [room.descriptor for room in made]
            socket.send_fds(self._connection, [response.SerializeToString()], descriptors)
            self._steps, self._answers = made
            self._taken = self._answered = 0
        except BaseException:
            self._budget.give_back(sum(sizes) * asked.slots)
            raise
        finally:
            for room in made:
                room.handed_over()

    def _leave_rooms(self) -> None:
        for room in (self._steps, self._answers):
            if room is not None:
                self._budget.give_back(len(room.bytes))
        self._steps = self._answers = None

    def _arrived(self, step: step_pb2.StepInput, at: float) -> Arrived:
        number = self._taken
        self._taken += 1
        try:
            self._service.check_step(step)
        except GradbankError as error:
            return Arrived.refusal(step, error)
        steps, answers = self._steps, self._answers
        if steps is None or answers is None or step.payload_bytes > steps.size or gradient_bytes(step) > answers.size:
            raise InvalidRequest(
                f"step {step.seq} needs rooms of {step.payload_bytes:,} and {gradient_bytes(step):,} bytes: ask for "
                "them first"
            )
        # a copy, before anything is made of it: the trainer's process may write there at any time
        return Arrived.of(step, assembled([steps.slot(number)[: step.payload_bytes]]), at)

    def _answer(self, arrived: Arrived) -> None:
        output, data = self._service.answered(arrived)
        if data:
            assert self._answers is not None  # else it was not carried out
            slot, start = self._answers.slot(self._answered), 0
            for part in data:
                slot[start : start + len(part)] = part
                start += len(part)
        self._answered += 1
        self._send(shared_pb2.SharedResponse(step=output))

    def _send(self, response: shared_pb2.SharedResponse) -> None:
        self._connection.sendall(response.SerializeToString())


def _remove_left_behind(folder: Path) -> None:
    """Removes what servers of this user left in a folder when they were killed."""
    for each in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # it went meanwhile, or is not what it seems
            found, place = each.lstat(), each / "shared"
            fresh = time.time() - found.st_mtime < _FRESH_S
            if fresh or found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode) or not place.is_socket():
                continue
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                probe.settimeout(1)
                try:
                    probe.connect(str(place))
                except ConnectionRefusedError:  # nobody listens
                    shutil.rmtree(each, ignore_errors=True)


def _read(packet: bytearray, size: int) -> shared_pb2.SharedRequest:
    if size > PACKET_BYTES:
        raise InvalidRequest(f"a packet has at most {PACKET_BYTES:,} bytes")
    try:
        return shared_pb2.SharedRequest.FromString(bytes(memoryview(packet)[:size]))
    except DecodeError as error:
        raise InvalidRequest(f"a packet cannot be read: {error}") from None


def _say(connection: socket.socket, response: shared_pb2.SharedResponse) -> None:
    with suppress(OSError):
        connection.sendall(response.SerializeToString())


def _rounded(size: int) -> int:
    """To a power of two, from 64 KiB on: so that batches of other sizes fit as well."""
    return 1 << max(16, (size - 1).bit_length())
