"""The statistics of a hosted loss: what it and its parts wrote down at the server, here."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import distances, losses, miners, reducers, regularizers
from gradbank.errors import InvalidRequest
from gradbank.recorder import Statistics

D = 8


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(24, D, generator=generator), torch.randint(5, (24,), generator=generator)


def watched() -> losses.TupletMarginLoss:
    return losses.TupletMarginLoss(
        distance=distances.CosineSimilarity(collect_stats=True),
        reducer=reducers.AvgNonZeroReducer(collect_stats=True),
        collect_stats=True,
    )


def in_a_memory() -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(watched(), D, 60, miner=miners.PairMarginMiner(collect_stats=True))


def in_parts() -> losses.MultipleLosses:
    sparse = regularizers.SparseCentersRegularizer(5, 2, collect_stats=True)
    centers = losses.SoftTripleLoss(5, D, centers_per_class=2, weight_regularizer=sparse)
    classes = losses.ArcFaceLoss(5, D, collect_stats=True)
    return losses.MultipleLosses(
        [watched(), losses.NPairsLoss(), centers, classes], [miners.TripletMarginMiner(), None, None, None]
    )


@pytest.mark.parametrize("make", [watched, in_a_memory, in_parts])
def test_they_are_those_of_the_same_loss_here(make: Any, anyway: gradbank.Client, name: str) -> None:
    here = make()
    there = anyway.open(name, here.rebuilt() if make is not in_parts else here)
    here = here if make is not in_parts else there.local()
    before = Statistics(there.hosted).read()
    assert not any(before.values())
    for seed in range(4):
        here(*batch(seed))
        there(*batch(seed))
        made = Statistics(there.hosted).read()
        assert made == pytest.approx(Statistics(here).read(), rel=1e-5)
    assert len(made) > 5
    assert any(made.values())


def test_they_are_written_to_the_loss_that_was_opened(client: gradbank.Client, name: str) -> None:
    loss = watched()
    there = client.open(name, loss)
    assert loss.avg_pos_angle == 0
    there(*batch(0))
    assert there.hosted is loss
    assert loss.avg_pos_angle > 0
    assert loss.reducer.losses_size == loss.reducer.num_above_low > 0
    assert type(loss.reducer.losses_size) is int
    assert loss.distance.final_avg_query_norm == pytest.approx(1)


def test_anybody_may_ask_for_the_last_ones(client: gradbank.Client, name: str) -> None:
    there = client.open(name, in_a_memory())
    for seed in range(3):
        there(*batch(seed))
    with gradbank.connect(client.address, timeout=20) as other:
        told = other.stats(name).statistics
    assert told == Statistics(there.hosted).read()
    assert told["loss.distance.final_avg_query_norm"] == pytest.approx(1)


def test_what_is_not_collected_is_not_sent(client: gradbank.Client, name: str) -> None:
    there = client.open(name, losses.NTXentLoss())
    there(*batch(0))
    assert Statistics(there.hosted).read() == {}
    assert there.hosted.distance.final_avg_query_norm is None


def test_a_step_that_is_refused_leaves_them(client: gradbank.Client, name: str) -> None:
    there = client.open(name, watched())
    there(*batch(0))
    before = Statistics(there.hosted).read()
    embeddings, labels = batch(1)
    with pytest.raises(InvalidRequest):
        there(embeddings, labels[1:])
    assert Statistics(there.hosted).read() == before
