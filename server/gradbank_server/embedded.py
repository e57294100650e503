"""A server inside this process: the same service, without a socket."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from google.protobuf.message import Message
from pydantic import ValidationError
from torch import Tensor

from gradbank.engine.precision import full_precision
from gradbank.engine.surroundings import own_graph
from gradbank.errors import GradbankError, InternalError, InvalidRequest, ServerUnavailable
from gradbank.v1 import session_pb2, stats_pb2, step_pb2
from gradbank.wire import assembled
from gradbank_server.service.server import device_named
from gradbank_server.service.service import Service
from gradbank_server.service.steps import Arrived
from gradbank_server.settings import ServerSettings

T = TypeVar("T")
Answered = tuple[step_pb2.StepOutput, Tensor]

_METHODS: dict[str, Callable[[Service, Any], Any]] = {
    "AttachSession": Service.attach_session,
    "CloseSession": Service.close_session,
    "ConfigureOptimizer": Service.configure_optimizer,
    "GetServer": Service.get_server,
    "GetSession": Service.get_session,
    "GetStats": Service.get_stats,
    "ListComponents": Service.list_components,
    "ListSessions": Service.list_sessions,
}


class EmbeddedTransport:
    """What `gradbank.connect("local://")` speaks through. Its sessions end with it.

    Args:
        device: "auto", "cpu" or "cuda:N"; what follows `local://`.
    """

    via = "local"

    def __init__(self, device: str = "") -> None:
        try:
            settings = ServerSettings()
        except ValidationError as error:
            raise InvalidRequest(f"the environment has settings that do not fit: {error}") from None
        self._service = Service(settings, device_named(device or settings.device))
        self._closed = False

    def call(self, method: str, request: Message, timeout: float) -> Any:
        return self._guarded(lambda: _METHODS[method](self._service, request))

    def create_session(
        self, header: session_pb2.CreateSessionRequest, payload: Iterable[memoryview], timeout: float
    ) -> session_pb2.CreateSessionResponse:
        def create() -> session_pb2.CreateSessionResponse:
            self._service.state_bytes(header)
            return self._service.create_session(header, assembled(payload))

        return self._guarded(create)

    def pull_state(
        self, request: session_pb2.PullStateRequest, timeout: float
    ) -> tuple[list[session_pb2.NamedTensor], Tensor]:
        def pull() -> tuple[list[session_pb2.NamedTensor], Tensor]:
            state, payload = self._service.pull_state(request)
            return state, assembled(payload)

        return self._guarded(pull)

    def watch(self, request: stats_pb2.WatchStatsRequest, timeout: float) -> "EmbeddedWatch":
        return self._guarded(lambda: EmbeddedWatch(self._service, request, lambda: self._closed))

    def steps(self, timeout: float) -> "EmbeddedSteps":
        return EmbeddedSteps(self._service, self._guarded)

    def close(self) -> None:
        self._closed = True

    def _guarded(self, call: Callable[[], T]) -> T:
        if self._closed:
            raise ServerUnavailable("the connection to local:// was closed, and its sessions with it")
        try:
            # the modes of the trainer's thread are not the server's, nor is its default device
            elsewhere = torch.get_default_device().type != "cpu"
            here = torch.device("cpu") if elsewhere else nullcontext()
            with torch.inference_mode(False), here, full_precision(self._service.device), own_graph():
                return call()
        except GradbankError:
            raise
        except Exception as error:
            raise InternalError(f"the embedded server failed; asking again is safe: {error!r}") from error


class EmbeddedWatch:
    """Statistics of an embedded server as they come, until `closed` holds."""

    def __init__(self, service: Service, request: stats_pb2.WatchStatsRequest, closed: Callable[[], bool]) -> None:
        self._over = threading.Event()
        self._told = service.watch_stats(request, lambda seconds: self._over.wait(seconds) or closed())

    def __next__(self) -> stats_pb2.WatchStatsResponse:
        return next(self._told)

    def close(self) -> None:
        self._over.set()


class EmbeddedSteps:
    """Steps of an embedded server, each carried out when it is sent: there is no stream that could break.

    Args:
        guarded: makes a call that may fail in any way.
    """

    def __init__(self, service: Service, guarded: Callable[[Callable[[], Answered]], Answered]) -> None:
        self._service, self._guarded = service, guarded
        self._answers: deque[Answered] = deque()

    def takes(self, step: step_pb2.StepInput) -> bool:
        return True

    def prepare(self, step: step_pb2.StepInput, timeout: float) -> None:
        """There is nothing to prepare."""

    def send(self, step: step_pb2.StepInput, payload: Iterable[memoryview], timeout: float) -> None:
        def stepped() -> Answered:
            self._service.check_step(step)
            output, data = self._service.step(Arrived.of(step, assembled(payload), time.perf_counter()))
            return output, assembled(data)

        try:
            answer = self._guarded(stepped)
        except InternalError as error:
            output = self._service.failed(step, error)
            if not output.carried_out:
                raise
            answer = output, assembled([])
        self._answers.append(answer)

    def receive(self, timeout: float) -> Answered:
        return self._answers.popleft()

    def close(self) -> None:
        """Nothing to close: the session lives on."""
