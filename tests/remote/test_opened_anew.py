"""A name that is opened again by the same client: another loss in the place of the former one."""

from pathlib import Path

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.errors import SessionNotFound
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings


def test_a_loss_that_is_opened_anew_starts_without_gradients(anyway: gradbank.Client, name: str) -> None:
    torch.manual_seed(0)
    batch, labels, head = torch.randn(32, 16), torch.arange(32) % 10, losses.ArcFaceLoss(10, 16)
    former = anyway.open(name, head)
    former.optimizer("SGD", lr=0.1)
    former(batch, labels).backward()  # type: ignore[no-untyped-call]  # torch's
    former.flush()
    again = anyway.open(name, head)
    optimizer = again.optimizer("SGD", lr=0.1)
    again(batch, labels).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    here = losses.ArcFaceLoss(10, 16)
    here.load_state_dict(head.state_dict())
    here(batch, labels).backward()  # type: ignore[no-untyped-call]
    assert here.W.grad is not None
    torch.testing.assert_close(again.local().W, (here.W - 0.1 * here.W.grad).detach())


def test_the_place_of_a_loss_that_was_opened_anew_is_waited_for() -> None:
    batch = torch.randn(8, 4), torch.arange(8) // 2
    with (
        Server(ServerSettings(port=0, metrics_port=-1, max_streams=1, drain_seconds=1)) as running,
        gradbank.connect(running.address) as client,
    ):
        for _ in range(150):
            assert client.open("kept", losses.NTXentLoss())(*batch).isfinite()


def test_a_closed_client_leaves_no_connection_of_a_loss_that_it_forgot(tmp_path: Path) -> None:
    settings = ServerSettings(port=0, metrics_port=-1, shared_memory=True, max_streams=2, drain_seconds=1)
    batch, kept = (torch.randn(8, 4), torch.arange(8) // 2), []
    with Server(settings) as running:
        for _ in range(4):
            client = gradbank.connect(running.address, via="shm")
            loss_fn = client.open("kept", losses.NTXentLoss())
            loss_fn(*batch)
            client.close_session("kept")
            with pytest.raises(SessionNotFound):
                loss_fn(*batch)
            client.close()
            kept.append(loss_fn)
