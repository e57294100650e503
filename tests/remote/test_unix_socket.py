"""Trainers on the server's machine, over a socket of the file system."""

import os
import socket
import stat
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.errors import InvalidRequest, ServerUnavailable
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings


def settings(place: Path | str) -> ServerSettings:
    return ServerSettings(port=0, metrics_port=-1, unix_socket=str(place), drain_seconds=1)


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "g.sock"


def test_a_loss_over_a_unix_socket_is_the_local_one_bit_for_bit(place: Path) -> None:
    with Server(settings(place)), gradbank.connect(f"unix://{place}", timeout=10) as client:
        here = losses.CrossBatchMemory(losses.NTXentLoss(), 16, 64)
        there = client.open("run", losses.CrossBatchMemory(losses.NTXentLoss(), 16, 64))
        for seed in range(4):
            rows = torch.randn(12, 16, generator=torch.Generator().manual_seed(seed))
            leaves = [rows.clone().requires_grad_() for _ in range(2)]
            values = [loss_fn(leaf, torch.arange(12) % 4) for loss_fn, leaf in zip((there, here), leaves)]
            for value in values:
                value.backward()
            assert torch.equal(*values)
            assert torch.equal(*(leaf.grad for leaf in leaves))


def test_only_the_servers_user_may_open_it_and_it_goes_with_the_server(place: Path) -> None:
    before = os.umask(0o022)
    os.umask(before)
    with Server(settings(place)):
        assert stat.S_IMODE(place.stat().st_mode) & 0o077 == 0
        assert os.umask(before) == before
    assert not place.exists()
    with pytest.raises(ServerUnavailable):
        gradbank.connect(f"unix://{place}", timeout=0.3)


def test_a_socket_that_was_left_behind_is_replaced(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(place))
    with Server(settings(place)), gradbank.connect(f"unix://{place}", timeout=10) as client:
        assert client.sessions() == []


def test_of_servers_that_find_one_left_behind_a_single_one_replaces_it(place: Path) -> None:
    for _ in range(10):
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(place))
        together, started = threading.Barrier(4), []

        def start(together: threading.Barrier = together, started: list[Server] = started) -> None:
            together.wait()
            with suppress(OSError):
                started.append(Server(settings(place)))

        threads = [threading.Thread(target=start) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        (server,) = started
        with server, gradbank.connect(f"unix://{place}", timeout=10) as client:
            assert client.sessions() == []
        assert not place.exists()


def test_what_is_in_use_or_no_socket_is_left_alone(place: Path) -> None:
    with Server(settings(place)):
        with pytest.raises(OSError, match="a server listens there already"):
            Server(settings(place))
        with gradbank.connect(f"unix://{place}", timeout=10) as client:
            assert client.sessions() == []
    place.write_text("mine")
    with pytest.raises(OSError, match="something else is there"):
        Server(settings(place))
    assert place.read_text() == "mine"
    with pytest.raises(OSError, match="there is no directory"):
        Server(settings(place.parent / "none" / "g.sock"))


@pytest.mark.parametrize("path", ["relative.sock", "/" + "x" * 120, "/run/a%20b", "/run/a?b"])
def test_a_path_that_cannot_be_a_socket_is_refused(path: str) -> None:
    with pytest.raises(InvalidRequest, match="absolute path of at most 100 bytes"):
        Server(settings(path))


@pytest.mark.parametrize("address", ["unix://relative.sock", "unix:/x", "http://x:1", "nowhere"])
def test_an_address_of_no_known_form_is_refused_with_those_there_are(address: str) -> None:
    with pytest.raises(InvalidRequest, match="host:port, unix:///path or local://"):
        gradbank.connect(address)
