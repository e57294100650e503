"""One trainer's steps through memory that it shares with the server; see shared.proto."""

import socket
import time
from collections.abc import Iterator
from contextlib import closing

from google.protobuf.message import DecodeError

from gradbank.errors import GradbankError, InvalidRequest, LimitExceeded
from gradbank.protocol import WINDOW
from gradbank.v1 import shared_pb2, step_pb2
from gradbank.wire import PACKET_BYTES, assembled, gradient_bytes
from gradbank_server.service.ahead import Ahead
from gradbank_server.service.gate import Gate
from gradbank_server.service.room import Budget, Room
from gradbank_server.service.service import Service
from gradbank_server.service.steps import Arrived


class Conversation:
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
        # gradients of half precision are twice as long, and who asks again asks for what was made of it
        if max(asked.steps, asked.answers) > _rounded(2 * limit):
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


def _read(packet: bytearray, size: int) -> shared_pb2.SharedRequest:
    if size > PACKET_BYTES:
        raise InvalidRequest(f"a packet has at most {PACKET_BYTES:,} bytes")
    try:
        return shared_pb2.SharedRequest.FromString(bytes(memoryview(packet)[:size]))
    except DecodeError as error:
        raise InvalidRequest(f"a packet cannot be read: {error}") from None


def _rounded(size: int) -> int:
    """To a power of two, from 64 KiB on: so that batches of other sizes fit as well."""
    return 1 << max(16, (size - 1).bit_length())
