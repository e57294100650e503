"""Steps through memory that a server on this machine shares; see shared.proto."""

import mmap
import os
import socket
import time
from collections.abc import Iterable

from google.protobuf.message import DecodeError
from torch import Tensor

from gradbank.errors import DeadlineExceeded, GradbankError, InternalError, LimitExceeded, ServerUnavailable
from gradbank.v1 import shared_pb2, step_pb2
from gradbank.wire import PACKET_BYTES, assembled, error_of, gradient_bytes


class SharedSteps:
    """A row of steps to the server at a socket, through memory that it shares with this process.

    Args:
        path: the socket's.
        boot_id: the server's, which nobody else at that path has.
        timeout: seconds that the server may take to answer.

    Raises:
        ServerUnavailable: it is not there.
        LimitExceeded, InvalidRequest: it takes no more trainers, or none of this user.
    """

    def __init__(self, path: str, boot_id: str, timeout: float) -> None:
        self._room, self._answers = memoryview(b""), memoryview(b"")
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._deadline = time.monotonic() + timeout
        try:
            self._within_time()
            self._connection.connect(path)
            if self._received()[0].boot_id != boot_id:
                raise ServerUnavailable(f"another server listens at {path}")
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and not isinstance(error, GradbankError):
                raise _unavailable(error) from None
            raise

    def exchange(
        self, step: step_pb2.StepInput, payload: Iterable[memoryview], timeout: float
    ) -> tuple[step_pb2.StepOutput, Tensor]:
        self._deadline = time.monotonic() + timeout
        try:
            return self._exchanged(step, payload)
        except GradbankError:  # some of which are errors of the system too
            raise
        except TimeoutError:
            raise DeadlineExceeded(f"step {step.seq} was not answered within {timeout:.3g} s") from None
        except OSError as error:
            raise _unavailable(error) from None

    def close(self) -> None:
        self._connection.close()

    def _exchanged(self, step: step_pb2.StepInput, payload: Iterable[memoryview]) -> tuple[step_pb2.StepOutput, Tensor]:
        answers = gradient_bytes(step)
        if step.payload_bytes > len(self._room) or answers > len(self._answers):
            self._ask_for(max(step.payload_bytes, len(self._room)), max(answers, len(self._answers)))
        start = 0
        for part in payload:
            self._room[start : start + len(part)] = part
            start += len(part)
        response, _ = self._call(shared_pb2.SharedRequest(step=step))
        output = response.step
        if output.seq != step.seq:
            raise InternalError(f"step {step.seq} was answered by the answer of step {output.seq}")
        if output.payload_bytes > len(self._answers):
            raise InternalError(f"the server's answer of {output.payload_bytes} bytes is longer than its memory")
        return output, assembled([self._answers[: output.payload_bytes]])

    def _ask_for(self, steps: int, answers: int) -> None:
        """Has the server share as much memory, in place of what it shared before."""
        rooms = shared_pb2.Rooms(steps=steps, answers=answers)
        response, descriptors = self._call(shared_pb2.SharedRequest(rooms=rooms), 2)
        try:
            if len(descriptors) != 2:
                raise InternalError("the server shared no memory, which it was asked for")
            self._room = memoryview(mmap.mmap(descriptors[0], response.rooms.steps))
            self._answers = memoryview(mmap.mmap(descriptors[1], response.rooms.answers, prot=mmap.PROT_READ))
        finally:
            for each in descriptors:
                os.close(each)

    def _call(
        self, request: shared_pb2.SharedRequest, descriptors: int = 0
    ) -> tuple[shared_pb2.SharedResponse, list[int]]:
        packet = request.SerializeToString()
        if len(packet) > PACKET_BYTES:
            raise LimitExceeded(
                f"what is to be told with the step takes {len(packet):,} bytes, and shared memory takes "
                f'{PACKET_BYTES:,} beside the tensors: connect with via="unix" or via="tcp", or call flush more often'
            )
        self._within_time()
        self._connection.send(packet)
        return self._received(descriptors)

    def _received(self, descriptors: int = 0) -> tuple[shared_pb2.SharedResponse, list[int]]:
        self._within_time()
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

    def _within_time(self) -> None:
        """Has the next call of the system end at the deadline; raises TimeoutError past it."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)


def _unavailable(error: OSError) -> ServerUnavailable:
    return ServerUnavailable(f"the server cannot be reached through shared memory: {error.strerror or error}")
