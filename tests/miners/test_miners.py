"""The multi-similarity miner, and what is asked of any miner's input."""

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.miners as pml_miners
import torch
from torch import Tensor

from gradbank import distances, miners

Listed = tuple[Tensor, Tensor, Tensor, Tensor]

DISTANCES: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda m: m.CosineSimilarity(),
    "Lp": lambda m: m.LpDistance(),
    "squared": lambda m: m.LpDistance(power=2, normalize_embeddings=False),
}


def pairs(listed: Any) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    a1, p, a2, n = (each.tolist() for each in listed)
    return sorted(zip(a1, p, strict=True)), sorted(zip(a2, n, strict=True))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.7, -0.2])
@pytest.mark.parametrize("references", [False, True])
def test_kept_pairs_are_those_of_pml(distance: str, epsilon: float, references: bool) -> None:
    torch.manual_seed(0)
    made = DISTANCES[distance]
    ours = miners.MultiSimilarityMiner(epsilon, distance=made(distances))
    theirs = pml_miners.MultiSimilarityMiner(epsilon, distance=made(pml_distances))
    kept = 0
    for rows in (1, 2, 7, 20):
        batch = torch.randn(rows, 4, dtype=torch.float64), torch.randint(3, (rows,))
        rest = (torch.randn(11, 4, dtype=torch.float64), torch.randint(3, (11,))) if references else ()
        found = ours(*batch, *rest)
        assert pairs(found) == pairs(theirs(*batch, *rest))
        assert all(each.dtype == torch.int64 for each in found)
        kept += len(found[0]) + len(found[2])
    assert kept > 0


@pytest.mark.parametrize("labels", [[0, 1, 2], [5, 5, 5], [7], []], ids=str)
def test_without_both_kinds_nothing_is_kept(labels: list[int]) -> None:
    embeddings = torch.randn(len(labels), 4)
    found = miners.MultiSimilarityMiner()(embeddings, torch.tensor(labels, dtype=torch.int64))
    assert [(len(each), each.dtype) for each in found] == [(0, torch.int64)] * 4


def test_pairs_come_in_order() -> None:
    torch.manual_seed(0)
    a1, p, a2, n = miners.MultiSimilarityMiner(2.5)(torch.randn(12, 4), torch.randint(3, (12,)))
    for anchors, others in ((a1, p), (a2, n)):
        listed = list(zip(anchors.tolist(), others.tolist(), strict=True))
        assert len(listed) > 12
        assert listed == sorted(set(listed))


def test_anchor_of_a_second_view_is_no_pair_of_its_own() -> None:
    """With ref_emb and one set of labels, reference i is anchor i; PML makes it a positive and a negative of itself."""
    torch.manual_seed(0)
    embeddings, views, labels = torch.randn(8, 4), torch.randn(8, 4), torch.randint(3, (8,))
    s = distances.CosineSimilarity()(embeddings, views).tolist()
    kept: tuple[list[tuple[int, int]], list[tuple[int, int]]] = [], []
    for a in range(8):
        positives = [b for b in range(8) if labels[b] == labels[a] and b != a]
        negatives = [b for b in range(8) if labels[b] != labels[a]]
        kept[0].extend((a, p) for p in positives if any(s[a][p] - 0.1 < s[a][n] for n in negatives))
        kept[1].extend((a, n) for n in negatives if any(s[a][n] + 0.1 > s[a][p] for p in positives))
    assert kept[0]
    assert pairs(miners.MultiSimilarityMiner()(embeddings, labels, views)) == kept


def test_mining_takes_no_gradient_and_no_half_precision() -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(12, 4), torch.randint(3, (12,))
    miner = miners.MultiSimilarityMiner()
    half = embeddings.bfloat16().requires_grad_()
    assert pairs(miner(half, labels)) == pairs(miner(half.detach().float(), labels))
    assert half.grad is None


def test_equal_labels_in_another_tensor_make_an_anchor_its_own_positive() -> None:
    """As in PML, where only the very same object means the batch itself."""
    torch.manual_seed(0)
    embeddings, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 1, 1])
    for ref_labels, wanted in ((labels, False), (labels.clone(), True)):
        a1, p, _, _ = miners.MultiSimilarityMiner(3.0)(embeddings, labels, embeddings, ref_labels)
        assert bool((a1 == p).any()) == wanted


def test_shapes_that_do_not_fit_are_refused() -> None:
    miner = miners.MultiSimilarityMiner()
    with pytest.raises(ValueError, match="one per row of embeddings"):
        miner(torch.randn(4, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="the same dimension, got 4 and 5"):
        miner(torch.randn(4, 4), torch.zeros(4), torch.randn(2, 5), torch.zeros(2))
