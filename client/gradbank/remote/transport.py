"""How messages reach a server: what a transport is. `channel` and `stream` are the one over gRPC."""

import time
from collections.abc import Iterable
from typing import Any, Protocol

from google.protobuf.message import Message
from torch import Tensor

from gradbank.errors import DeadlineExceeded, InternalError
from gradbank.v1 import session_pb2, stats_pb2, step_pb2

SLOWEST_BYTES_PER_S = 10 * 2**20  # what a transfer of weights or of a bank is given time for


def left_until(deadline: float) -> float:
    """Seconds until a time of `time.monotonic`; 0 if it has passed."""
    return max(deadline - time.monotonic(), 0.0)


class Steps(Protocol):
    """A row of steps to one server, answered in order. One thread may send while another receives."""

    def takes(self, step: step_pb2.StepInput) -> bool:
        """Whether this step can be sent without a wait for the server."""
        ...

    def prepare(self, step: step_pb2.StepInput, timeout: float) -> None:
        """Makes it so, while none is in flight."""
        ...

    def send(self, step: step_pb2.StepInput, payload: Iterable[memoryview], timeout: float) -> None:
        """Sends a step, without waiting for its answer."""
        ...

    def receive(self, timeout: float) -> tuple[step_pb2.StepOutput, Tensor]:
        """The next answer: the output, and its tensors' bytes.

        Raises:
            DeadlineExceeded: it did not come in time. Then there are no more, as after any other error.
        """
        ...

    def close(self) -> None: ...


def answer_of(steps: Steps, seq: int, timeout: float) -> tuple[step_pb2.StepOutput, Tensor]:
    """The next answer, which is to be that of a step."""
    try:
        output, data = steps.receive(timeout)
    except DeadlineExceeded:
        raise DeadlineExceeded(f"step {seq} was not answered within {timeout:.3g} s") from None
    if output.seq != seq:
        raise InternalError(f"step {seq} was answered by the answer of step {output.seq}")
    return output, data


class Watched(Protocol):
    """Statistics as they come."""

    def __next__(self) -> stats_pb2.WatchStatsResponse: ...

    def close(self) -> None:
        """Ends it, and the wait of a thread that waits for the next."""
        ...


class Transport(Protocol):
    """A way to a server. Every method raises `GradbankError`s only.

    Attributes:
        via: what steps go through: "local", "shm", "unix" or "tcp".
    """

    via: str

    def call(self, method: str, request: Message, timeout: float) -> Any:
        """A call of one message each way; `method` is its name in the .proto files."""
        ...

    def create_session(
        self, header: session_pb2.CreateSessionRequest, payload: Iterable[memoryview], timeout: float
    ) -> session_pb2.CreateSessionResponse: ...

    def pull_state(
        self, request: session_pb2.PullStateRequest, timeout: float
    ) -> tuple[list[session_pb2.NamedTensor], Tensor]: ...

    def watch(self, request: stats_pb2.WatchStatsRequest, timeout: float) -> Watched:
        """Statistics as they come, of which none may be more than `timeout` seconds late."""
        ...

    def steps(self, timeout: float) -> Steps: ...

    def close(self) -> None: ...
