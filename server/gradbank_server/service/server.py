"""A server: the service behind gRPC, with health, reflection and /metrics, and an orderly end."""

import errno
import socket
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc
import structlog
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from prometheus_client import start_http_server

from gradbank.errors import InvalidRequest
from gradbank.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    stats_pb2,
    stats_pb2_grpc,
    step_pb2,
)
from gradbank.wire import MESSAGE_BYTES
from gradbank_server.service.gate import Gate
from gradbank_server.service.service import Service
from gradbank_server.service.servicers import (
    CatalogServicer,
    ReflectionServicer,
    SessionServicer,
    StatsServicer,
    StepServicer,
)
from gradbank_server.service.shared import SharedMemory
from gradbank_server.service.sockets import listen_on_socket
from gradbank_server.settings import ServerSettings
from gradbank_server.threads import Computing

log = structlog.get_logger()
_LOOKS_EVERY_S = 0.02

SHORT_CALLS = 16  # threads for calls that are no streams

_SERVICES = [
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (session_pb2, "SessionService"),
        (step_pb2, "StepService"),
        (stats_pb2, "StatsService"),
        (catalog_pb2, "CatalogService"),
    )
]


class Server:
    """Listens from `start` on, until `stop`.

    Args:
        settings: where, and how much; port 0 picks a free one, which `port` then tells.
        lost: called when the device failed in such a way that this process cannot use it any more.

    Raises:
        InvalidRequest: a device that is not there, an address beyond loopback without `insecure`, or a unix socket
            whose path cannot be one, or shared memory on a system that has none.
        OSError: an address that cannot be listened on.
    """

    def __init__(self, settings: ServerSettings, lost: Callable[[], None] = lambda: None) -> None:
        check_exposure(settings)
        self.settings = settings
        device = device_named(settings.device)
        self._computing = Computing(device)
        self.service = Service(settings, device, run=self._computing.run, lost=lost)
        self._health = health.HealthServicer()
        self._metrics_server: Any = None
        self.metrics_port: int | None = None
        self._gate = Gate(settings.max_streams)
        self._grpc = grpc.server(
            # what has a place holds a thread, for as long as its peer or its session likes; the rest is for short
            # calls, so that a full server still says it is healthy
            futures.ThreadPoolExecutor(self._gate.places + SHORT_CALLS, thread_name_prefix="gradbank"),
            maximum_concurrent_rpcs=self._gate.places + 4 * SHORT_CALLS,
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES),
                ("grpc.max_send_message_length", -1),
                # what a peer can make us hold before a handler runs: this much a stream, and no more
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", 2**20),
                ("grpc.server_handshake_timeout_ms", 10_000),
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
                ("grpc.so_reuseport", 0),
            ],
        )
        self._nearer = stats_pb2.GetServerResponse(unix_socket=settings.unix_socket)
        self._add_services()
        try:
            self.port = self._grpc.add_insecure_port(f"{bracketed(settings.host)}:{settings.port}")
        except RuntimeError:
            raise OSError(
                f"cannot listen on {settings.host}:{settings.port}: {_why_not(settings.host, settings.port)}"
            ) from None
        if settings.unix_socket:
            listen_on_socket(self._grpc, settings.unix_socket)
        self._shared = None
        if settings.shared_memory:
            self._shared = SharedMemory(self.service, self._gate, settings.max_shared_bytes)

    @property
    def address(self) -> str:
        """Where clients on this machine connect."""
        host = self.settings.host
        return f"{bracketed('127.0.0.1' if host in ('0.0.0.0', '') else '::1' if host == '::' else host)}:{self.port}"

    @property
    def computes(self) -> bool:
        """Whether a step is under way, be it of a session that is being closed."""
        return self._computing.is_busy

    def start(self) -> None:
        settings = self.settings
        if settings.metrics_port >= 0:
            try:
                self._metrics_server, _ = start_http_server(
                    settings.metrics_port, addr=settings.host, registry=self.service.metrics.registry
                )
            except OSError as error:
                raise OSError(
                    f"cannot listen for /metrics on {settings.host}:{settings.metrics_port}: {error.strerror}; choose "
                    "another --metrics-port, or -1 for none"
                ) from None
            self.metrics_port = self._metrics_server.server_port
        if self._shared is not None:
            self._nearer.shared_memory_socket = self._shared.start()
        self._grpc.start()
        for name in ("", *_SERVICES):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> None:
        """Refuses new steps, waits for those under way, and ends."""
        if self._gate.closing.is_set():
            return
        self._gate.closing.set()
        self._health.enter_graceful_shutdown()
        log.info("draining", seconds=min(self.settings.drain_seconds, threading.TIMEOUT_MAX))  # JSON has no infinity
        until = time.monotonic() + self.settings.drain_seconds
        for session in self.service.sessions.all():
            session.wait(max(until - time.monotonic(), 0.0))
        while self.computes and time.monotonic() < until:  # a step of a session that is being closed
            time.sleep(_LOOKS_EVERY_S)
        # streams of trainers do not end by themselves: this is for the last answers to leave
        self._grpc.stop(grace=min(2.0, self.settings.drain_seconds)).wait()
        if self._shared is not None:
            self._shared.stop()
        self._computing.close()
        if self._metrics_server is not None:
            self._metrics_server.shutdown()
            self._metrics_server.server_close()
        log.info("stopped")

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _add_services(self) -> None:
        server, service, gate = self._grpc, self.service, self._gate
        session_pb2_grpc.add_SessionServiceServicer_to_server(SessionServicer(service, gate), server)
        server.add_generic_rpc_handlers((StepServicer(service, gate).handlers(),))
        stats_pb2_grpc.add_StatsServiceServicer_to_server(StatsServicer(service, gate, self._nearer), server)
        catalog_pb2_grpc.add_CatalogServiceServicer_to_server(CatalogServicer(service), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self.settings.reflection:
            names = (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(ReflectionServicer(names, service, gate), server)


def device_named(name: str) -> torch.device:
    """The device that `name` means; "auto" is the first GPU, or the CPU where there is none.

    Raises:
        InvalidRequest: no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidRequest(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def check_exposure(settings: ServerSettings) -> None:
    """Refuses to listen beyond loopback unless that was asked for: there is neither TLS nor authentication yet."""
    if settings.insecure or settings.host in ("127.0.0.1", "::1", "localhost"):
        return
    raise InvalidRequest(
        f"--host {settings.host} lets anyone who reaches this machine use the server: there is neither TLS nor "
        "authentication yet. Put it behind a network that you trust and add --insecure, or stay on 127.0.0.1"
    )


def _why_not(host: str, port: int) -> str:
    """Why nobody can listen there, which gRPC keeps to itself."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as attempt:
            attempt.bind(address)
    except OSError as error:
        another = "choose another --port, or 0 for one that is free"
        advice = {errno.EADDRINUSE: another, errno.EACCES: another}
        return f"{error.strerror}; {advice.get(error.errno or 0, '--host must be an address of this machine')}"
    return "gRPC could not bind to it"


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
