"""What tests share: a real server on a free port, and clients of it."""

import itertools
from collections.abc import Iterator

import pytest
import structlog
import torch

import gradbank
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings

_numbers = itertools.count()


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the tests run side by side
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))  # no lines between the dots


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A server that all tests of a worker share: each opens sessions of its own."""
    with Server(ServerSettings(port=0, metrics_port=0, max_sessions=10_000)) as running:
        yield running


@pytest.fixture(scope="session")
def nearby(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that can be reached in every way there is."""
    place = tmp_path_factory.mktemp("s") / "g.sock"
    settings = ServerSettings(port=0, metrics_port=-1, max_sessions=10_000, unix_socket=str(place), shared_memory=True)
    with Server(settings) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[gradbank.Client]:
    with gradbank.connect(server.address, timeout=20) as connected:
        yield connected


@pytest.fixture(scope="session")
def embedded() -> Iterator[gradbank.Client]:
    with gradbank.connect("local://", timeout=20) as connected:
        yield connected


@pytest.fixture
def name() -> str:
    """A session's name that no other test uses."""
    return f"test-{next(_numbers)}"
