"""A network that fails on request, and a server in a process of its own that can be stopped and killed."""

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import losses
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings

UP, DOWN = "up", "down"  # from the client to the server, and back


class Connection:
    """The two ends of a connection, and the directions whose bytes are read and dropped."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.ends, self.lost = (client, server), set[str]()


class Proxy:
    """Passes bytes between clients and a server, until it is told to lose some."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[Connection] = []
        self._left: dict[str, int | None] = {UP: None, DOWN: None}
        self._losing = set[str]()
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, direction: str, count: int) -> None:
        """Breaks the connection once `count` more bytes have passed in a direction."""
        self._left[direction] = count

    def spare(self) -> None:
        """Does not break the connection that it was told to."""
        self._left = {UP: None, DOWN: None}

    def cut(self) -> None:
        """Breaks all connections; the next will be well."""
        self.cuts += 1
        self._left, self._losing = {UP: None, DOWN: None}, set()
        held, self._open = self._open, []
        for connection in held:
            for each in connection.ends:
                _end(each)

    def lose(self, direction: str) -> None:
        """From now on, loses what the connections there are send in a direction."""
        self._left = {UP: None, DOWN: None}
        for connection in self._open:
            connection.lost.add(direction)

    def lose_all(self, direction: str) -> None:
        """Likewise, and of those to come, until they are cut."""
        self.lose(direction)
        self._losing = {direction}

    def lose_answers_until(self, carried_out: Callable[[], bool]) -> None:
        """Lets requests through and loses what comes back; once the condition holds, breaks the connection."""
        self.lose(DOWN)

        def cut_then() -> None:
            wait_until(carried_out)
            self.cut()

        threading.Thread(target=cut_then, daemon=True).start()

    def close(self) -> None:
        _end(self._listener)
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
                server = socket.create_connection(self._target)
            except OSError:
                return
            made = Connection(client, server)
            made.lost |= self._losing
            self._open.append(made)
            for direction, source, sink in ((UP, client, server), (DOWN, server, client)):
                threading.Thread(target=self._pump, args=(made, direction, source, sink), daemon=True).start()

    def _pump(self, connection: Connection, direction: str, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                left = self._left[direction]  # which the test may set to something else meanwhile
                if left is not None:
                    self._left[direction] = max(left - len(data), 0)
                if direction not in connection.lost:
                    sink.sendall(data[:left])
                if left is not None and left <= len(data):
                    self.cut()
        except OSError:
            pass
        _end(source)
        _end(sink)


def _end(each: socket.socket) -> None:
    with suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.002)


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    made = Proxy(server.port)
    yield made
    made.close()


@pytest.fixture
def far(proxy: Proxy) -> Iterator[gradbank.Client]:
    """A client behind the proxy."""
    with gradbank.connect(proxy.address, timeout=20) as client:
        yield client


@pytest.fixture(params=[False, True], ids=["", "read-ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the server read the next step meanwhile whatever its size, too."""
    if request.param:
        monkeypatch.setattr("gradbank_server.service.steps.CHUNK_BYTES", 0)


@pytest.fixture
def near(server: Server) -> Iterator[gradbank.Client]:
    """A client of this test's own, without the proxy in between."""
    with gradbank.connect(server.address, timeout=20) as client:
        yield client


@pytest.fixture(params=["grpc", "local"])
def either(request: pytest.FixtureRequest, server: Server) -> Iterator[gradbank.Client]:
    """A client of either transport."""
    with gradbank.connect(server.address if request.param == "grpc" else "local://", timeout=20) as client:
        yield client


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen, str]]:
    """A server in another process, and its address."""
    command = [sys.executable, "-m", "gradbank_server", "serve", "--port", "0", "--metrics-port", "-1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
        assert running.stdout is not None
        lines = iter(running.stdout.readline, "")
        yield running, next(found[1] for line in lines if (found := re.search(r"listening +(\S+)", line)))
        running.kill()


@pytest.fixture(params=["tcp", "unix", "shm", "local"])
def anyway(request: pytest.FixtureRequest, nearby: Server) -> Iterator[gradbank.Client]:
    """A client of a server, behind each way to one."""
    if request.param == "local":
        with gradbank.connect("local://", timeout=20) as client:
            yield client
    else:
        with gradbank.connect(nearby.address, timeout=20, via=request.param) as client:
            yield client


def serving(**settings: object) -> Server:
    return Server(ServerSettings(port=0, metrics_port=-1, shared_memory=True, drain_seconds=1, **settings))


@pytest.fixture
def shm(nearby: Server) -> Iterator[gradbank.Client]:
    with gradbank.connect(nearby.address, timeout=20, via="shm") as client:
        yield client


@pytest.fixture
def place(shm: gradbank.Client) -> str:
    return shm.server().shared_memory_socket


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 8, generator=generator), torch.arange(12) % 4) for _ in range(6)]


def head() -> losses.ArcFaceLoss:
    torch.manual_seed(0)
    return losses.ArcFaceLoss(4, 8, scale=8)
