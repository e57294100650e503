"""What tests share: a real server on a free port, clients of it, and the device that they run on."""

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_metric_learning
import structlog
import torch

import gradbank
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings

_numbers = itertools.count()
_HERE = (str(Path(__file__).parent) + os.sep, str(Path(pytorch_metric_learning.__file__).parent) + os.sep)
_TORCH = str(Path(torch.__file__).parent) + os.sep
_MAKES = (
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.randperm,
    torch.tensor,
    torch.zeros,
)
_ROUNDINGS = 1000  # by which what is equal on a CPU may differ on a GPU, after a few steps of an optimizer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tensors of the tests are, as in --device cuda")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--device"))
    os.environ["GRADBANK_DEVICE"] = str(device)  # where servers compute, too: not on a GPU because there is one
    if device.type != "cpu":
        _make_tensors_on(device)
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


def _make_tensors_on(device: torch.device) -> None:
    """From now on, what a test makes is on a device, drawn as on a CPU; so is what pytorch-metric-learning makes, which
    does not always move it there. What gradbank makes is where gradbank puts it: a default device would hide that it
    forgot to."""

    def on_device(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def made(*args: Any, requires_grad: bool = False, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if kwargs.get("device") is None and not tensor.is_meta and _of_a_test():
                tensor = tensor.to(device)
            return tensor.requires_grad_() if requires_grad else tensor

        return made

    def numpy(tensor: torch.Tensor, **_: Any) -> Any:
        return as_numpy(tensor.detach().cpu() if _of_a_test() else tensor)

    def assert_close(actual: Any, expected: Any, **kwargs: Any) -> None:
        close(actual, expected, **{"check_device": False, **kwargs})  # what a server keeps is sent to a CPU

    def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
        if not _of_a_test():
            return same(one, other)
        one, other = one.detach(), other.detach().to(one.device)
        if one.shape != other.shape or one.dtype != other.dtype or not one.is_floating_point():
            return same(one, other)
        finite = one[one.isfinite()]
        largest = float(finite.abs().max()) if len(finite) else 0.0
        # a GPU adds up in any order: to rounding, then, beside the largest
        return torch.allclose(one, other, 0, _ROUNDINGS * torch.finfo(one.dtype).eps * largest, equal_nan=True)

    as_numpy, close, same = torch.Tensor.numpy, torch.testing.assert_close, torch.equal
    for make in _MAKES:
        setattr(torch, make.__name__, on_device(make))
    torch.Tensor.numpy, torch.testing.assert_close, torch.equal = numpy, assert_close, equal


def _of_a_test() -> bool:
    """Whether the caller's caller is a test, by itself or through torch."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(_HERE)
