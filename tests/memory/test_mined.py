"""What a miner says of a queue, of which it makes no list, is what PML's says that does."""

from typing import Any

import pytest
import torch
from pytorch_metric_learning import distances as pml_distances
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from torch import Tensor

import gradbank
from gradbank import distances, engine, losses, miners, reducers
from gradbank.recorder import Statistics

D, SLOTS = 6, 30


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, D, dtype=torch.float64, generator=generator), torch.arange(8) % 3


def both(loss: str, miner: str, distance: str, **arguments: Any) -> list[Any]:
    """A queue here and PML's, each with that loss and a miner of the same distance that collects."""
    made = []
    for of_losses, of_miners, of_distances in (
        (losses, miners, distances),
        (pml_losses, pml_miners, pml_distances),
    ):
        measure = getattr(of_distances, distance)
        taken = getattr(of_miners, miner)(distance=measure(), collect_stats=True, **arguments)
        made.append(of_losses.CrossBatchMemory(getattr(of_losses, loss)(distance=measure()), D, SLOTS, taken))
    return made


@pytest.mark.parametrize("distance", ["LpDistance", "CosineSimilarity"])
@pytest.mark.parametrize(
    ("loss", "miner", "arguments"),
    [
        ("ContrastiveLoss", "MultiSimilarityMiner", {"epsilon": 0.3}),
        ("ContrastiveLoss", "PairMarginMiner", {"pos_margin": 0.6, "neg_margin": 0.9}),
        ("NTXentLoss", "PairMarginMiner", {"pos_margin": 5.0, "neg_margin": -5.0}),  # takes none
        *(
            ("TripletMarginLoss", "TripletMarginMiner", {"type_of_triplets": kind, "margin": 0.15})
            for kind in ("all", "hard", "semihard", "easy")
        ),
        ("NTXentLoss", "TripletMarginMiner", {"margin": 0.4}),  # of which it makes a list
        ("TripletMarginLoss", "BatchHardMiner", {}),
    ],
)
def test_a_miner_counts_what_it_takes_of_a_queue(
    loss: str, miner: str, arguments: dict[str, Any], distance: str
) -> None:
    ours, theirs = both(loss, miner, distance, **arguments)
    for step in range(6):  # until the queue has wrapped around
        for queue in (ours, theirs):
            queue(*batch(step))
        found = Statistics(ours.miner).read()
        wanted = {name: float(getattr(theirs.miner, name)) for name in found if hasattr(theirs.miner, name)}
        assert {"num_triplets", "num_pos_pairs", "num_neg_pairs"} <= wanted.keys()
        torch.testing.assert_close({name: float(found[name]) for name in wanted}, wanted, rtol=1e-7, atol=1e-7)
    assert any(wanted.values())


def test_the_size_of_a_tile_does_not_change_what_is_counted() -> None:
    counts = []
    for bounds in (None, engine.Bounds(tile=16, rows=3, positives=5, kept=0, ready=1)):
        queue, _ = both("TripletMarginLoss", "TripletMarginMiner", "LpDistance", margin=0.3)
        with engine.using("tiled", bounds):
            for step in range(4):
                queue(*batch(step))
        counts.append(Statistics(queue.miner).read())
    torch.testing.assert_close(*counts, rtol=1e-12, atol=0)
    assert counts[0]["num_triplets"] > 0


@pytest.mark.parametrize("forced", ["tiled", "dense"])
@pytest.mark.parametrize("miner", ["MultiSimilarityMiner", "PairMarginMiner", "TripletMarginMiner", "BatchHardMiner"])
def test_of_an_empty_queue_there_is_nothing_to_take(forced: str, miner: str) -> None:
    queue, _ = both("TripletMarginLoss", miner, "LpDistance")
    embeddings, labels = batch(0)
    with engine.using(forced):
        loss = queue(embeddings.requires_grad_(), labels, enqueue_mask=torch.zeros(8, dtype=torch.bool))
        loss.backward()
        queue(embeddings[:0], labels[:0])
    assert (loss.item(), queue.miner.num_triplets, queue.miner.num_pos_pairs) == (0, 0, 0)


class Seen(reducers.BaseReducer):
    """The mean, by a method that wants to see every loss."""

    def triplet_reduction(self, losses: Tensor, indices: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
        return losses.mean()


@pytest.mark.parametrize("kind", ["all", "hard", "semihard", "easy"])
def test_a_miner_is_heeded_by_a_reducer_that_sees_every_loss(kind: str) -> None:
    made = []
    for reducer in (reducers.MeanReducer(), Seen()):
        taken = miners.TripletMarginMiner(0.2, kind)
        memory = losses.CrossBatchMemory(losses.TripletMarginLoss(reducer=reducer), D, SLOTS, taken)
        leaf = batch(4)[0].requires_grad_()
        for seed in (1, 2, 3):
            memory(*batch(seed))
        loss = memory(leaf, batch(4)[1])
        made.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(*made)
    assert bool(made[0][0]) == (kind != "easy")


def test_nothing_is_counted_that_was_not_asked_for() -> None:
    queue = losses.CrossBatchMemory(losses.ContrastiveLoss(), D, SLOTS, miners.MultiSimilarityMiner())
    queue(*batch(0))
    assert queue.miner.num_pos_pairs == 0


def test_a_server_tells_what_its_miner_took(client: gradbank.Client, name: str) -> None:
    here, _ = both("TripletMarginLoss", "TripletMarginMiner", "LpDistance")
    there = client.open(name, here)
    for step in range(2):
        there(*batch(step))
        here(*batch(step))
    assert there.hosted.miner.num_triplets == here.miner.num_triplets > 0
    assert client.stats(name).statistics["miner.num_triplets"] == here.miner.num_triplets
