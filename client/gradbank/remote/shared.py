"""Steps through memory that a server on this machine shares; see shared.proto."""

import mmap
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

from google.protobuf.message import DecodeError
from torch import Tensor

from gradbank.errors import DeadlineExceeded, GradbankError, InternalError, LimitExceeded, ServerUnavailable
from gradbank.protocol import WINDOW
from gradbank.v1 import shared_pb2, step_pb2
from gradbank.wire import PACKET_BYTES, assembled, error_of, gradient_bytes

T = TypeVar("T")


class SharedSteps:
    """A row of steps to the server at a socket, through memory that it shares with this process.

    Args:
        path: the socket's.
        boot_id: the server's, which nobody else at that path has.
        timeout: seconds that the server may take to answer.
        full: called when a step does not fit the memory that there is; the connection is then as if it had ended, and
            the step can go another way. None: such a step is refused.

    Raises:
        ServerUnavailable: it is not there.
        LimitExceeded, InvalidRequest: it takes no more trainers, or none of this user.
    """

    def __init__(self, path: str, boot_id: str, timeout: float, full: Callable[[], None] | None = None) -> None:
        self._full, self._process = full, os.getpid()
        self._room, self._answers = memoryview(b""), memoryview(b"")
        self._slots, self._wanted = 1, 1  # how many parts the rooms have, and are to have
        self._sent = self._answered = 0
        self._early: deque[tuple[step_pb2.StepOutput, Tensor]] = deque()  # read before they were asked for
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sending = self._connection  # until it has one of its own
        deadline = time.monotonic() + timeout
        try:
            _end_by(deadline, self._connection)
            self._connection.connect(path)
            self._sending = self._connection.dup()  # the same, but for how long who sends may wait
            if self._received(deadline)[0].boot_id != boot_id:
                raise ServerUnavailable(f"another server listens at {path}")
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, GradbankError):
                raise _unavailable(error) from None
            raise

    def takes(self, step: step_pb2.StepInput) -> bool:
        if self._sent != self._answered:
            self._wanted = WINDOW  # from now on there will be several in flight
            return self._sent - self._answered < self._slots and self._fits(step)
        return self._slots >= self._wanted and self._fits(step)

    def prepare(self, step: step_pb2.StepInput, timeout: float) -> None:
        if not self.takes(step):
            with self._or_otherwise():
                _within(timeout, partial(self._ask_for, step))

    def send(self, step: step_pb2.StepInput, payload: Iterable[memoryview], timeout: float) -> None:
        def send(deadline: float) -> None:
            while not self.takes(step):  # several are sent again, over this connection that was made for them
                if self._sent == self._answered:
                    self._ask_for(step, deadline)
                else:
                    self._early.append(self._receive(deadline))
            self._send(step, payload, deadline)

        with self._or_otherwise():
            _within(timeout, send)

    def receive(self, timeout: float) -> tuple[step_pb2.StepOutput, Tensor]:
        return self._early.popleft() if self._early else _within(timeout, self._receive)

    @contextmanager
    def _or_otherwise(self) -> Iterator[None]:
        try:
            yield
        except LimitExceeded as error:
            if self._full is None:
                raise
            self._full()
            raise ServerUnavailable(f"no more shared memory: {error}") from None

    def close(self) -> None:
        with suppress(OSError):  # it may never have been connected
            self._connection.shutdown(socket.SHUT_RDWR)  # which wakes a thread that waits, as closing does not
        self._connection.close()
        self._sending.close()

    def end(self) -> None:
        """Closes it, unless it is the parent's of this process."""
        if os.getpid() == self._process:
            self.close()

    def __del__(self) -> None:
        if hasattr(self, "_sending"):  # of a client that nobody closed
            self.end()

    def _send(self, step: step_pb2.StepInput, payload: Iterable[memoryview], deadline: float) -> None:
        start = self._sent % self._slots * (len(self._room) // self._slots)
        for part in payload:
            self._room[start : start + len(part)] = part
            start += len(part)
        self._tell(shared_pb2.SharedRequest(step=step), deadline)
        self._sent += 1

    def _receive(self, deadline: float) -> tuple[step_pb2.StepOutput, Tensor]:
        output = self._received(deadline)[0].step
        size = len(self._answers) // self._slots
        if output.payload_bytes > size:
            raise InternalError(f"the server's answer of {output.payload_bytes} bytes is longer than its memory")
        start = self._answered % self._slots * size
        data = assembled([self._answers[start : start + output.payload_bytes]])
        self._answered += 1
        return output, data

    def _fits(self, step: step_pb2.StepInput) -> bool:
        room, answers = len(self._room) // self._slots, len(self._answers) // self._slots
        return bool(self._room) and step.payload_bytes <= room and gradient_bytes(step) <= answers

    def _ask_for(self, step: step_pb2.StepInput, deadline: float) -> None:
        """Has the server share memory for such a step, in place of what it shared before; none is in flight."""
        rooms = shared_pb2.Rooms(
            steps=max(step.payload_bytes, len(self._room) // self._slots),
            answers=max(gradient_bytes(step), len(self._answers) // self._slots),
            slots=self._wanted,
        )
        self._tell(shared_pb2.SharedRequest(rooms=rooms), deadline)
        response, descriptors = self._received(deadline, 2)
        try:
            if len(descriptors) != 2 or response.rooms.slots != self._wanted:
                raise InternalError("the server shared no memory, or not what it was asked for")
            self._slots, made = self._wanted, response.rooms
            self._room = memoryview(mmap.mmap(descriptors[0], made.steps * made.slots))
            self._answers = memoryview(mmap.mmap(descriptors[1], made.answers * made.slots, prot=mmap.PROT_READ))
            self._sent = self._answered = 0
        finally:
            for each in descriptors:
                os.close(each)

    def _tell(self, request: shared_pb2.SharedRequest, deadline: float) -> None:
        packet = request.SerializeToString()
        if len(packet) > PACKET_BYTES:
            raise LimitExceeded(
                f"what is to be told with the step takes {len(packet):,} bytes, and shared memory takes "
                f'{PACKET_BYTES:,} beside the tensors: connect with via="unix" or via="tcp", or call flush more often'
            )
        _end_by(deadline, self._sending)
        self._sending.send(packet)

    def _received(self, deadline: float, descriptors: int = 0) -> tuple[shared_pb2.SharedResponse, list[int]]:
        _end_by(deadline, self._connection)
        data, passed, _, _ = socket.recv_fds(self._connection, PACKET_BYTES, descriptors)
        try:
            if not data:
                raise ServerUnavailable("the server ended the connection")
            response = shared_pb2.SharedResponse.FromString(data)
            if response.HasField("error"):
                raise error_of(response.error)
        except BaseException as error:
            for each in passed:
                os.close(each)
            if isinstance(error, DecodeError):
                raise InternalError(f"the server's answer cannot be read: {error}") from None
            raise
        return response, passed


def _within(timeout: float, call: Callable[[float], T]) -> T:
    """What a call gives that is to be over at a time."""
    try:
        return call(time.monotonic() + timeout)
    except GradbankError:  # some of which are errors of the system too
        raise
    except TimeoutError:
        raise DeadlineExceeded(f"no answer came within {timeout:.3g} s") from None
    except OSError as error:
        raise _unavailable(error) from None


def _end_by(deadline: float, connection: socket.socket) -> None:
    """Has the next call of the system end at a time; raises TimeoutError past it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)


def _unavailable(error: OSError) -> ServerUnavailable:
    return ServerUnavailable(f"the server cannot be reached through shared memory: {error.strerror or error}")
