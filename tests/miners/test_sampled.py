"""Miners that draw at random: what is drawn, how often, and from the same seed again."""

import itertools
import math

import pytest
import pytorch_metric_learning.miners as pml_miners
import torch
from torch import Tensor

from gradbank import distances, miners


def chances(d: list[float], dimension: int, cutoff: float, end: float) -> list[float]:
    """The paper's chance of each negative, one at a time."""
    weights = []
    for each in d:
        x = max(each, cutoff)
        log_q = (dimension - 2) * math.log(x) + (dimension - 3) / 2 * math.log(1 - x * x / 4)
        weights.append(math.exp(-log_q) if x < end else 0.0)
    return [weight / sum(weights) for weight in weights]


def test_negatives_are_drawn_by_their_weight_and_positives_evenly() -> None:
    torch.manual_seed(0)
    anchor = torch.randn(1, 6, dtype=torch.float64)
    negatives = anchor + torch.linspace(0.3, 6, 12)[:, None] * torch.randn(12, 6, dtype=torch.float64)
    positives = torch.randn(20_000, 6, dtype=torch.float64)  # as many triplets
    references, labels = torch.cat([negatives, positives]), torch.tensor([1] * 12 + [0] * 20_000)
    a, p, n = miners.DistanceWeightedMiner(0.7, 1.3)(anchor, torch.tensor([0]), references, labels)
    assert len(a) == len(p) == len(n) == 20_000
    d = distances.LpDistance()(anchor, negatives)[0].tolist()
    expected = torch.tensor(chances(d, 6, 0.7, 1.3))
    assert 2 <= int((expected > 0.02).sum()) < 12  # some are too far, some closer than the cutoff
    assert min(d) < 0.7 < 1.3 < max(d)
    drawn = torch.bincount(n, minlength=12)[:12] / 20_000
    assert bool(((drawn - expected).abs() <= 4 * (expected * (1 - expected) / 20_000).sqrt()).all())
    assert bool((labels[p] == 0).all())
    quarters = torch.bincount((p - 12) // 5000, minlength=4) / 20_000
    assert bool(((quarters - 0.25).abs() < 4 * math.sqrt(0.25 * 0.75 / 20_000)).all())
    assert len(p.unique()) == pytest.approx(20_000 * (1 - math.exp(-1)), rel=0.02)


@pytest.mark.parametrize("references", [False, True])
def test_anchors_get_as_many_weighted_triplets_as_from_pml(references: bool) -> None:
    torch.manual_seed(0)
    given = [torch.randn(40, 8), torch.randint(6, (40,))]
    rest = [torch.randn(30, 8), torch.randint(8, (30,))] if references else []
    labels = rest[1] if references else given[1]
    found, theirs = miners.DistanceWeightedMiner()(*given, *rest), pml_miners.DistanceWeightedMiner()(*given, *rest)
    assert torch.equal(torch.bincount(found[0], minlength=40), torch.bincount(theirs[0], minlength=40))
    a, p, n = found
    assert all(each.dtype == torch.int64 for each in found)
    assert bool((given[1][a] == labels[p]).all())
    assert bool((given[1][a] != labels[n]).all())
    assert references or bool((a != p).all())
    d = distances.LpDistance()(given[0], rest[0] if references else given[0])
    assert float(d[a, n].max()) < 1.4


def test_anchor_is_kept_whose_weights_are_far_below_anothers() -> None:
    """In PML all weights are scaled by the largest, which two near rows of high dimension make too large for others."""
    torch.manual_seed(0)
    embeddings, labels = torch.randn(20, 256), torch.arange(20) // 2
    embeddings[2] = embeddings[0] + 0.4 * torch.randn(256)
    d = distances.LpDistance()(embeddings)
    near = (d < 1.4) & (labels[:, None] != labels)
    a = miners.DistanceWeightedMiner()(embeddings, labels)[0]
    assert torch.equal(a.unique(), near.any(1).nonzero().squeeze(1))
    assert len(pml_miners.DistanceWeightedMiner()(embeddings, labels)[0]) < len(a)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [5, 5, 5, 5]], ids=str)
def test_no_triplets_are_drawn_where_there_are_none(labels: list[int]) -> None:
    found = miners.DistanceWeightedMiner()(torch.randn(4, 3), torch.tensor(labels))
    assert [(len(each), each.dtype) for each in found] == [(0, torch.int64)] * 3


def bins_of(d: Tensor, every: Tensor, number: int) -> Tensor:
    """How many of the distances lie in each bin of the range of all of them."""
    edges = torch.linspace(float(every.min()), float(every.max()), number + 1, dtype=d.dtype)
    counts = [((d >= low) & (d < high)).sum() for low, high in itertools.pairwise(edges)]
    counts[-1] = (d >= edges[-2]).sum()
    return torch.stack(counts)


@pytest.mark.parametrize(
    "distance", [distances.LpDistance(p=1), distances.SNRDistance()], ids=lambda d: type(d).__name__
)
@pytest.mark.parametrize("references", [False, True])
def test_every_bin_that_is_not_empty_gives_as_many_pairs(distance: distances.Distance, references: bool) -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(30, 6, dtype=torch.float64), torch.randint(3, (30,))
    rest = (torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))) if references else ()
    others, known = rest or (embeddings, labels)
    d, same = distance(embeddings, others), labels[:, None] == known
    a1, p, a2, n = miners.UniformHistogramMiner(20, 7, 5, distance=distance)(embeddings, labels, *rest)
    negatives = ~same
    if not references:
        same.fill_diagonal_(False)
    for a, b, mask, number in ((a1, p, same, 7), (a2, n, negatives, 5)):
        assert bool(mask[a, b].all())
        assert a.dtype == b.dtype == torch.int64
        held = bins_of(d[mask], d[mask], 20)
        assert torch.equal(bins_of(d[a, b], d[mask], 20), number * (held > 0))
        assert int((held > 0).sum()) > 2


def test_pairs_of_a_bin_are_drawn_evenly() -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(9, 3), torch.arange(9) % 2
    _, _, a2, n = miners.UniformHistogramMiner(1, 1, 40_000)(embeddings, labels)
    drawn = torch.bincount(a2 * 9 + n)
    drawn = drawn[drawn > 0] / 40_000
    assert len(drawn) == 40
    assert bool(((drawn - 1 / 40).abs() < 4.5 * math.sqrt(1 / 40 / 40_000)).all())


def test_equal_distances_lie_in_one_bin() -> None:
    embeddings, labels = torch.eye(3)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])
    found = miners.UniformHistogramMiner(10, 3, 4)(embeddings, labels)
    assert [len(each) for each in found] == [3, 3, 4, 4]


@pytest.mark.parametrize(
    "miner", [miners.DistanceWeightedMiner(), miners.UniformHistogramMiner()], ids=lambda m: type(m).__name__
)
def test_a_seed_draws_the_same_again(miner: miners.Miner) -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(30, 8), torch.randint(5, (30,))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(torch.cat(miner(embeddings, labels)))
    assert torch.equal(drawn[0], drawn[1])
    assert drawn[0].shape == drawn[2].shape
    assert not torch.equal(drawn[0], drawn[2])


def test_numbers_below_one_are_refused() -> None:
    for name in ("num_bins", "pos_per_bin", "neg_per_bin"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number from 1 to .*, got 0"):
            miners.UniformHistogramMiner(**{name: 0})


def test_distance_between_two_bins_lies_in_the_farther_one() -> None:
    """As in PML, and the farthest of all in the last bin."""
    torch.manual_seed(0)
    embeddings, labels = torch.arange(4.0)[:, None], torch.tensor([0, 1, 1, 1])
    miner = miners.UniformHistogramMiner(2, 1, 50, distance=distances.LpDistance(normalize_embeddings=False))
    _, _, a2, n = miner(embeddings, labels)
    number = torch.bincount((a2 - n).abs(), minlength=4)
    assert number.tolist() == [0, 50, int(number[2]), 50 - int(number[2])]
    assert 0 < int(number[2]) < 50
