"""Where a server is said to be, when it is, and what else may be there."""

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.errors import Fenced, InternalError, InvalidRequest
from gradbank_server.service import Server


@pytest.mark.parametrize("port", ["0", "65536", "115587"])
def test_a_port_that_is_none_is_refused(port: str) -> None:
    """gRPC would take it for another."""
    with pytest.raises(InvalidRequest, match=r"a port is a number from 1 to 65535, got .127\.0\.0\.1:"):
        gradbank.connect(f"127.0.0.1:{port}")


def test_another_server_of_grpc_is_told_from_ours() -> None:
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        with pytest.raises(InternalError, match="no server of gradbank, or one of another version"):
            gradbank.connect(f"127.0.0.1:{port}")
    finally:
        other.stop(None)


def test_a_clock_that_is_set_back_does_not_keep_a_trainer_from_its_rank(
    server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, now = (torch.randn(8, 4), torch.arange(8) // 2), time.time_ns()
    with gradbank.connect(server.address) as client, gradbank.connect(server.address) as another:
        client.open(name, losses.NTXentLoss())(*batch)
        monkeypatch.setattr(time, "time_ns", lambda: now - 3600 * 10**9)
        again = client.open(name, losses.NTXentLoss())
        assert torch.isfinite(again(*batch))
        with pytest.raises(Fenced, match="held by a trainer that started later"):
            another.open(name, losses.NTXentLoss())
        assert torch.isfinite(again(*batch))
