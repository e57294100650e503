"""How messages reach a server: what a transport is, and the one over gRPC."""

import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message
from torch import Tensor

from gradbank.errors import DeadlineExceeded, GradbankError, InternalError, InvalidRequest, ServerUnavailable
from gradbank.v1 import (
    catalog_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    stats_pb2,
    stats_pb2_grpc,
    step_pb2,
)
from gradbank.wire import MESSAGE_BYTES, Assembly, Frame, chunks, error_of, nbytes, response_frame

T = TypeVar("T")


def left_until(deadline: float) -> float:
    """Seconds until a time of `time.monotonic`; 0 if it has passed."""
    return max(deadline - time.monotonic(), 0.0)


class Steps(Protocol):
    """A row of steps to one server, answered in order. One thread may send while another receives."""

    def takes(self, step: step_pb2.StepInput) -> bool:
        """Whether this step can be sent before those in flight are answered."""
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


class GrpcTransport:
    """A channel to `host:port`, or to a socket at `unix:///path`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.via = "unix" if address.startswith("unix:") else "tcp"
        self._connect()

    def _connect(self) -> None:
        self._channel = grpc.insecure_channel(
            self.address,
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES),
                ("grpc.max_send_message_length", MESSAGE_BYTES),
                ("grpc.enable_retries", 0),  # gRPC's own would carry a step out twice
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 2_000),
                ("grpc.use_local_subchannel_pool", 1),  # so that closing this client closes its connection
            ],
        )
        self._sessions = session_pb2_grpc.SessionServiceStub(self._channel)
        self._stats = stats_pb2_grpc.StatsServiceStub(self._channel)
        self._stubs = (self._sessions, self._stats, catalog_pb2_grpc.CatalogServiceStub(self._channel))

    def call(self, method: str, request: Message, timeout: float) -> Any:
        call = next(getattr(stub, method) for stub in self._stubs if hasattr(stub, method))
        return self._answer(lambda: call(request, timeout=timeout))

    def create_session(
        self, header: session_pb2.CreateSessionRequest, payload: Iterable[memoryview], timeout: float
    ) -> session_pb2.CreateSessionResponse:
        def messages() -> Iterator[session_pb2.CreateSessionRequest]:
            yield header
            for part in chunks(payload):
                yield session_pb2.CreateSessionRequest(payload=b"".join(part))

        return self._answer(lambda: self._sessions.CreateSession(messages(), timeout=timeout))

    def pull_state(
        self, request: session_pb2.PullStateRequest, timeout: float
    ) -> tuple[list[session_pb2.NamedTensor], Tensor]:
        parts = self._arriving(lambda: self._sessions.PullState(request), timeout)
        first = next(parts)
        state = list(first.state)
        payload = Assembly(sum(nbytes(named.tensor) for named in state))
        payload.add(first.payload)
        for part in parts:
            payload.add(part.payload)
        return state, payload.payload()

    def watch(self, request: stats_pb2.WatchStatsRequest, timeout: float) -> "Arriving":
        return self._arriving(lambda: self._stats.WatchStats(request), request.interval_s + timeout)

    def steps(self, timeout: float) -> Steps:
        return self._answer(lambda: GrpcSteps(self._channel, self._renew))

    def close(self) -> None:
        self._channel.close()

    def _answer(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except grpc.RpcError as error:
            raise error_of(error) from None
        except ValueError as error:  # grpc's own, on a channel that was closed
            raise ServerUnavailable(f"the connection to {self.address} was closed ({error})") from None
        except BaseException:
            self._renew()
            raise

    def _renew(self) -> None:
        """Goes on over another channel: Ctrl-C inside gRPC can leave a lock of its taken, which all that goes over that
        channel would wait for."""
        _end_beside(self._channel.close)
        self._connect()

    def _arriving(self, begin: Callable[[], Any], timeout: float) -> "Arriving":
        return Arriving(self._answer(begin), self.address, timeout)


class Arriving:
    """The messages of a server's stream, none of which may be more than `timeout` seconds after the one before."""

    def __init__(self, call: Any, address: str, timeout: float) -> None:
        self._call, self._address, self._timeout = call, address, timeout
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._over = False
        threading.Thread(target=_read, args=(call, self._arrived), name="gradbank-stream", daemon=True).start()

    def __iter__(self) -> "Arriving":
        return self

    def __next__(self) -> Any:
        if self._over:
            raise StopIteration
        try:
            message = self._arrived.get(timeout=self._timeout)
        except queue.Empty:
            self.close()
            raise DeadlineExceeded(f"nothing was heard of {self._address} for {self._timeout:.3g} s") from None
        if isinstance(message, Exception):
            self._over = True
            raise message
        return message

    def close(self) -> None:
        """Ends the stream, and the wait of a thread that waits for its next message."""
        self._over = True
        self._arrived.put(StopIteration())
        if not sys.is_finalizing():  # gRPC's threads have stopped then, maybe with the lock that this takes
            self._call.cancel()

    def __del__(self) -> None:
        self.close()


def _read(call: Any, arrived: "queue.SimpleQueue[Any]") -> None:
    try:
        for message in call:
            arrived.put(message)
        arrived.put(StopIteration())
    except grpc.RpcError as error:
        arrived.put(error_of(error))


class GrpcSteps:
    """One stream of steps. Who waits for an answer reads it, and a thread beside ends the wait in time."""

    def __init__(self, channel: grpc.Channel, interrupted: Callable[[], None]) -> None:
        self._interrupted, self._broken = interrupted, False
        self._requests: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        steps: Any = channel.stream_stream("/gradbank.v1.StepService/Steps", response_deserializer=response_frame)
        self._call = steps(self._encoded())
        self._watch = _Watch(self._call.cancel)

    def _encoded(self) -> Iterator[bytes]:
        """The messages to send. gRPC holds on to the last one until the next: a frame would hold the whole batch."""
        while (frame := self._requests.get()) is not None:
            message = frame.encoded()
            del frame
            yield message

    def takes(self, step: step_pb2.StepInput) -> bool:
        return True

    def send(self, step: step_pb2.StepInput, payload: Iterable[memoryview], timeout: float) -> None:
        if self._watch.ended:  # at the last moment of a step that was answered nonetheless
            raise ServerUnavailable("the stream of steps was ended")
        for i, part in enumerate(chunks(payload)):
            self._requests.put(Frame(step if i == 0 else None, part))

    def receive(self, timeout: float) -> tuple[step_pb2.StepOutput, Tensor]:
        deadline = time.monotonic() + timeout
        with self._watch.until(deadline):
            try:
                return self._answer()
            except grpc.RpcError as error:
                if self._watch.ended and time.monotonic() >= deadline:  # and not that of an answer before
                    raise DeadlineExceeded(f"no answer came within {timeout:.3g} s") from None
                raise error_of(error) from None
            except GradbankError:
                raise
            except BaseException:
                self._broken = True
                self._interrupted()
                raise

    def close(self) -> None:
        self._requests.put(None)
        self._watch.close()
        if self._broken:
            _end_beside(self._call.cancel)
        else:
            self._call.cancel()

    def _answer(self) -> tuple[step_pb2.StepOutput, Tensor]:
        frame = next(self._call, None)
        if frame is None:
            raise ServerUnavailable("the server ended the stream of steps")
        if frame.step is None:
            raise InternalError("the server's answer cannot be read: it begins in the middle")
        output = frame.step
        assert isinstance(output, step_pb2.StepOutput)
        try:
            payload = Assembly(output.payload_bytes)
            while True:
                for part in frame.payload:
                    payload.add(part)
                if payload.complete:
                    return output, payload.payload()
                frame = next(self._call, None)
                if frame is None:
                    raise ServerUnavailable("the server ended the stream in the middle of an answer")
        except (InvalidRequest, RuntimeError) as error:  # torch's own, where more is announced than there is memory
            raise InternalError(f"the server's answer cannot be read: {error}") from None


def _end_beside(end: Callable[[], object]) -> None:
    """Ends what was interrupted inside gRPC, in a thread that may wait for ever; so may whoever drops the last
    reference to it, and the thread holds one."""
    threading.Thread(target=end, name="gradbank-end", daemon=True).start()


class _Watch:
    """Calls `end` if something is not over in time.

    Attributes:
        ended: whether it has.
    """

    def __init__(self, end: Callable[[], object]) -> None:
        self._end, self.ended = end, False
        self._until, self._wakes, self._closed = math.inf, math.inf, False
        self._lock = threading.Lock()  # taken by itself: a Condition that is interrupted as it is taken stays taken
        self._changed = threading.Condition(self._lock)
        threading.Thread(target=self._run, name="gradbank-watch", daemon=True).start()

    @contextmanager
    def until(self, time_s: float) -> Iterator[None]:
        """Whatever runs in the block is to be over at that time of `time.monotonic`."""
        with self._lock:
            self._until = time_s
            if time_s < self._wakes:  # else the thread looks again before that, and need not be woken
                self._changed.notify()
        try:
            yield
        finally:
            with self._lock:  # from here on it has ended, or will not
                self._until = math.inf

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        with self._lock:
            while not self._closed:
                now = time.monotonic()
                if self._until <= now:
                    self.ended = True
                    self._end()
                    return
                self._wakes = min(self._until, now + _LOOKS_EVERY_S) if self._until < math.inf else math.inf
                self._changed.wait(None if self._wakes == math.inf else self._wakes - now)


_LOOKS_EVERY_S = 60.0  # at most: a lock cannot be waited for as long as a timeout may be
