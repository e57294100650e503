"""A transport over gRPC."""

import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from torch import Tensor

from gradbank.errors import DeadlineExceeded, ServerUnavailable
from gradbank.remote.stream import GrpcSteps, end_beside
from gradbank.remote.transport import SLOWEST_BYTES_PER_S, Steps, left_until
from gradbank.v1 import catalog_pb2_grpc, session_pb2, session_pb2_grpc, stats_pb2, stats_pb2_grpc
from gradbank.wire import MESSAGE_BYTES, Assembly, chunks, error_of, state_bytes

T = TypeVar("T")
_HERE = ("127.0.0.1", "localhost", "[::1]")


class _Connection:
    """A channel and what calls over it.

    Attributes:
        left: set once nothing more is to go over it.
    """

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(
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
                # no proxy leads to this machine, and elsewhere http_proxy and no_proxy are gRPC's to read
                ("grpc.enable_http_proxy", int(address.rpartition(":")[0] not in _HERE)),
            ],
        )
        self.left = threading.Event()
        self.sessions = session_pb2_grpc.SessionServiceStub(self.channel)
        self.stats = stats_pb2_grpc.StatsServiceStub(self.channel)
        self.stubs = (self.sessions, self.stats, catalog_pb2_grpc.CatalogServiceStub(self.channel))


class GrpcTransport:
    """A connection to `host:port`, or to a socket at `unix:///path`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.via = "unix" if address.startswith("unix:") else "tcp"
        self._now = _Connection(address)

    def call(self, method: str, request: Message, timeout: float) -> Any:
        call = next(getattr(stub, method) for stub in self._now.stubs if hasattr(stub, method))
        return self._answer(lambda: call(request, timeout=timeout))

    def create_session(
        self, header: session_pb2.CreateSessionRequest, payload: Iterable[memoryview], timeout: float
    ) -> session_pb2.CreateSessionResponse:
        def messages() -> Iterator[session_pb2.CreateSessionRequest]:
            yield header
            for part in chunks(payload):
                yield session_pb2.CreateSessionRequest(payload=b"".join(part))

        return self._answer(lambda: self._now.sessions.CreateSession(messages(), timeout=timeout))

    def pull_state(
        self, request: session_pb2.PullStateRequest, timeout: float
    ) -> tuple[list[session_pb2.NamedTensor], Tensor]:
        begun = time.monotonic()
        parts = self._arriving(lambda: self._now.sessions.PullState(request), timeout)
        first = next(parts)
        state = list(first.state)
        size = state_bytes(state)
        payload = Assembly(size)
        parts.until = begun + timeout + size / SLOWEST_BYTES_PER_S
        payload.add(first.payload)
        for part in parts:
            payload.add(part.payload)
        return state, payload.payload()

    def watch(self, request: stats_pb2.WatchStatsRequest, timeout: float) -> "Arriving":
        between = max(0.0, request.interval_s)  # the server refuses others, which are no time to wait
        return self._arriving(lambda: self._now.stats.WatchStats(request), between + timeout)

    def steps(self, timeout: float) -> Steps:
        now = self._now
        renew, go_on = partial(self._renew, now), partial(self._go_on, now)
        return self._answer(lambda: GrpcSteps(now.channel, now.left, renew, go_on))

    def close(self) -> None:
        self._now.channel.close()

    def _answer(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except grpc.RpcError as error:
            raise error_of(error) from None
        except ValueError as error:  # grpc's own, on a channel that was closed
            raise ServerUnavailable(f"the connection to {self.address} was closed ({error})") from None
        except BaseException:
            self._renew(self._now)
            raise

    def _renew(self, old: _Connection) -> None:
        """Goes on over another connection: Ctrl-C inside gRPC can leave a lock of its taken, and all that goes over the
        old one would wait for it."""
        self._go_on(old)
        old.left.set()
        end_beside(old.channel.close)

    def _go_on(self, old: _Connection) -> None:
        """Has what begins from now on go over another connection; what is under way keeps the old one."""
        if self._now is old:  # and not left already
            self._now = _Connection(self.address)

    def _arriving(self, begin: Callable[[], Any], timeout: float) -> "Arriving":
        return Arriving(self._answer(begin), self.address, timeout)


class Arriving:
    """The messages of a server's stream, none of which may be more than `timeout` seconds after the one before.

    Attributes:
        until: when all of them are to be there, of `time.monotonic`.
    """

    def __init__(self, call: Any, address: str, timeout: float) -> None:
        self._call, self._address, self._timeout, self.until = call, address, timeout, math.inf
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._over = False
        threading.Thread(target=_read, args=(call, self._arrived), name="gradbank-stream", daemon=True).start()

    def __iter__(self) -> "Arriving":
        return self

    def __next__(self) -> Any:
        if self._over:
            raise StopIteration
        try:
            message = self._arrived.get(timeout=min(self._timeout, left_until(self.until)))
        except queue.Empty:
            self.close()
            late = "took too long" if left_until(self.until) == 0 else f"was silent for {self._timeout:.3g} s"
            raise DeadlineExceeded(f"{self._address} {late}") from None
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
        if hasattr(self, "_arrived"):  # or it was interrupted as it was made
            self.close()


def _read(call: Any, arrived: "queue.SimpleQueue[Any]") -> None:
    try:
        for message in call:
            arrived.put(message)
        arrived.put(StopIteration())
    except grpc.RpcError as error:
        arrived.put(error_of(error))
