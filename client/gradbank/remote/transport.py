"""How messages reach a server: what a transport is, and the one over gRPC."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from gradbank.errors import DeadlineExceeded, InternalError, ServerUnavailable
from gradbank.v1 import (
    catalog_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    stats_pb2,
    stats_pb2_grpc,
    step_pb2,
    step_pb2_grpc,
)
from gradbank.wire import MESSAGE_BYTES, Assembly, chunks, error_of, nbytes

T = TypeVar("T")


class Steps(Protocol):
    """A row of steps to one server, answered in order."""

    def exchange(
        self, step: step_pb2.StepInput, payload: Iterable[memoryview], timeout: float
    ) -> tuple[step_pb2.StepOutput, bytes]:
        """Sends a step and waits for its answer: the output, and its tensors' bytes."""
        ...

    def close(self) -> None: ...


class Transport(Protocol):
    """A way to a server. Every method raises `GradbankError`s only."""

    def call(self, method: str, request: Message, timeout: float) -> Any:
        """A call of one message each way; `method` is its name in the .proto files."""
        ...

    def create_session(
        self, header: session_pb2.CreateSessionRequest, payload: Iterable[memoryview], timeout: float
    ) -> session_pb2.CreateSessionResponse: ...

    def pull_state(
        self, request: session_pb2.PullStateRequest, timeout: float
    ) -> tuple[list[session_pb2.NamedTensor], bytes]: ...

    def watch(self, request: stats_pb2.WatchStatsRequest, timeout: float) -> Iterator[stats_pb2.WatchStatsResponse]:
        """Statistics as they come, of which none may be more than `timeout` seconds late."""
        ...

    def steps(self) -> Steps: ...

    def close(self) -> None: ...


class GrpcTransport:
    """A channel to `host:port`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(
            address,
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
        self._steps = step_pb2_grpc.StepServiceStub(self._channel)
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
                yield session_pb2.CreateSessionRequest(payload=part)

        return self._answer(lambda: self._sessions.CreateSession(messages(), timeout=timeout))

    def pull_state(
        self, request: session_pb2.PullStateRequest, timeout: float
    ) -> tuple[list[session_pb2.NamedTensor], bytes]:
        parts = self._arriving(lambda: self._sessions.PullState(request), timeout)
        first = next(parts)
        state = list(first.state)
        payload = Assembly(sum(nbytes(named.tensor) for named in state))
        payload.add(first.payload)
        for part in parts:
            payload.add(part.payload)
        return state, payload.bytes()

    def watch(self, request: stats_pb2.WatchStatsRequest, timeout: float) -> Iterator[stats_pb2.WatchStatsResponse]:
        return self._arriving(lambda: self._stats.WatchStats(request), request.interval_s + timeout)

    def steps(self) -> "GrpcSteps":
        return self._answer(lambda: GrpcSteps(self._steps))

    def close(self) -> None:
        self._channel.close()

    def _answer(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except grpc.RpcError as error:
            raise error_of(error) from None
        except ValueError as error:  # grpc's own, on a channel that was closed
            raise ServerUnavailable(f"the connection to {self.address} was closed ({error})") from None

    def _arriving(self, begin: Callable[[], Any], timeout: float) -> Iterator[Any]:
        """The messages of a server's stream, none of which may be more than `timeout` seconds after the one before."""
        call = self._answer(begin)
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def read() -> None:
            try:
                for message in call:
                    arrived.put(message)
                arrived.put(None)
            except grpc.RpcError as error:
                arrived.put(error_of(error))

        threading.Thread(target=read, name="gradbank-stream", daemon=True).start()
        try:
            while (message := arrived.get(timeout=timeout)) is not None:
                if isinstance(message, Exception):
                    raise message
                yield message
        except queue.Empty:
            raise DeadlineExceeded(f"nothing was heard of {self.address} for {timeout:.3g} s") from None
        finally:
            call.cancel()


class GrpcSteps:
    """One stream of steps. A thread of its own reads the answers, so that waiting for one can end in time."""

    def __init__(self, stub: step_pb2_grpc.StepServiceStub) -> None:
        self._requests: queue.SimpleQueue[step_pb2.StepsRequest | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[step_pb2.StepOutput, bytes] | Exception] = queue.SimpleQueue()
        self._call = stub.Steps(iter(self._requests.get, None))
        threading.Thread(target=self._read, name="gradbank-steps", daemon=True).start()

    def exchange(
        self, step: step_pb2.StepInput, payload: Iterable[memoryview], timeout: float
    ) -> tuple[step_pb2.StepOutput, bytes]:
        for i, part in enumerate(chunks(payload)):
            self._requests.put(step_pb2.StepsRequest(step=step if i == 0 else None, payload=part))
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise DeadlineExceeded(f"step {step.seq} was not answered within {timeout:.3g} s") from None
        if isinstance(answer, Exception):
            raise answer
        if answer[0].seq != step.seq:
            raise InternalError(f"step {step.seq} was answered by the answer of step {answer[0].seq}")
        return answer

    def close(self) -> None:
        self._requests.put(None)
        self._call.cancel()

    def _read(self) -> None:
        try:
            for response in self._call:
                payload = Assembly(response.step.payload_bytes)
                part = response
                payload.add(part.payload)
                while not payload.complete:
                    part = next(self._call)
                    payload.add(part.payload)
                self._answers.put((response.step, payload.bytes()))
            self._answers.put(ServerUnavailable("the server ended the stream of steps"))
        except grpc.RpcError as error:
            self._answers.put(error_of(error))
        except StopIteration:
            self._answers.put(ServerUnavailable("the server ended the stream in the middle of an answer"))
        except Exception as error:
            self._answers.put(InternalError(f"the server's answer cannot be read: {error}"))
