"""What a server counts and times is what was done: on /metrics, in statistics, and against its limits."""

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.errors import InvalidRequest, LimitExceeded
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings

from .conftest import metrics

OUTSIDE = ("client_encode", "network", "client_decode")  # phases of a step that the server does not see


def batch(seed: int = 0, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 16, generator=made), torch.randint(0, 4, (rows,), generator=made)


def memory() -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(), 16, 64)


def test_metrics_count_what_happens(own: Server) -> None:
    with gradbank.connect(own.address, timeout=10) as client:
        there, arc = client.open("run", memory()), client.open("arc", losses.ArcFaceLoss(4, 16))
        for seed in range(3):
            there(*batch(seed))
        arc(*batch())
        with pytest.raises(InvalidRequest):
            there(batch()[0] * float("nan"), batch()[1])
        found = metrics(own)
        rows, weights = client.stats("run"), client.stats("arc")
    assert found['gradbank_steps_total{loss="CrossBatchMemory(NTXentLoss)",outcome="ok"}'] == 3
    assert found['gradbank_steps_total{loss="CrossBatchMemory(NTXentLoss)",outcome="rejected"}'] == 1
    assert found['gradbank_steps_total{loss="ArcFaceLoss",outcome="ok"}'] == 1
    assert found['gradbank_step_seconds_count{phase="compute"}'] == 4
    # a trainer tells of a step with the next one
    assert [found[f'gradbank_step_seconds_count{{phase="{p}"}}'] for p in OUTSIDE] == [2, 2, 2]
    assert all(rows.mean_seconds[phase] > 0 and weights.mean_seconds[phase] == 0 for phase in OUTSIDE)
    assert found["gradbank_received_bytes_total"] == rows.received_bytes + weights.received_bytes == 4 * 8 * (64 + 8)
    assert found["gradbank_sessions"] == 2
    assert found["gradbank_bank_rows"] == rows.bank_rows == 24
    assert found["gradbank_bank_bytes"] == rows.bank_bytes
    assert found["gradbank_weight_bytes"] == weights.weight_bytes == 4 * 16 * 4
    (build,) = (name for name in found if name.startswith("gradbank_build_info"))
    assert f'version="{gradbank.__version__}"' in build
    assert "run" not in " ".join(found), "no session is a label: there is no end to them"


def test_what_compares_nothing_is_in_no_mean_of_a_steps_time(own: Server) -> None:
    with gradbank.connect(own.address, timeout=10) as client:
        there = client.open("run", memory())
        there(*batch(0))
        before = client.stats("run").mean_seconds["compute"]
        there.add_to_memory(*batch(1))
        there.reset_queue()
        assert client.stats("run").mean_seconds["compute"] == before
        found = metrics(own)
    assert found['gradbank_steps_total{loss="CrossBatchMemory(NTXentLoss)",outcome="ok"}'] == 1
    assert found['gradbank_steps_total{loss="CrossBatchMemory(NTXentLoss)",outcome="told"}'] == 2
    assert found['gradbank_step_seconds_count{phase="compute"}'] == 1


def test_the_time_of_rows_that_only_enter_is_none_of_the_trainers_steps(own: Server) -> None:
    with gradbank.connect(own.address, timeout=10) as client:
        there = client.open("run", memory())
        for seed in range(3):
            there(*batch(seed))
            there.add_to_memory(*batch(seed))
        found = metrics(own)
    assert [found[f'gradbank_step_seconds_count{{phase="{phase}"}}'] for phase in OUTSIDE] == [3, 3, 3]


def test_a_refused_batch_counts_once_however_many_were_sent_behind_it(own: Server) -> None:
    rows, labels = batch()
    with gradbank.connect(own.address, timeout=10) as client:
        there = client.open("run", losses.NTXentLoss())
        futures = [there.submit(rows * float("nan"), labels), *(there.submit(rows, labels) for _ in range(3))]
        with pytest.raises(InvalidRequest):
            futures[0].result()
        assert all(future.result().isfinite() for future in futures[1:])
        found = metrics(own)
        assert client.stats("run").rejected == 1
    assert found['gradbank_steps_total{loss="NTXentLoss",outcome="rejected"}'] == 1
    assert found['gradbank_steps_total{loss="NTXentLoss",outcome="ok"}'] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_session_that_fits_can_be_opened_again_from_its_checkpoint(dtype: torch.dtype) -> None:
    size, dimension = 64, 16
    with (
        Server(ServerSettings(port=0, metrics_port=-1, max_session_bytes=size * (4 * dimension + 8))) as server,
        gradbank.connect(server.address, timeout=10) as client,
    ):
        there = client.open("run", losses.CrossBatchMemory(losses.NTXentLoss(), dimension, size))
        rows = torch.randn(size, dimension, dtype=dtype)
        there.add_to_memory(rows, torch.arange(size))
        saved = there.local()
        client.close_session("run")
        again = client.open("run", saved)
        assert torch.equal(again.local().embedding_memory, rows)
        with pytest.raises(LimitExceeded, match="a session may take"):
            client.open("more", losses.CrossBatchMemory(losses.NTXentLoss(), dimension, size + 1))


def test_the_time_behind_ones_own_steps_is_no_time_of_the_network(own: Server) -> None:
    rows, labels = batch()
    with gradbank.connect(own.address, timeout=10) as client:
        there = client.open("run", losses.NTXentLoss())
        there(rows, labels)
        assert "network" in there.timings
        with own.service.sessions["run"]._turn:  # until the second is sent
            futures = [there.submit(rows, labels) for _ in range(2)]
        futures[1].result()
        assert "network" not in there.timings
