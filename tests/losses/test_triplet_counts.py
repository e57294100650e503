"""How many triplets count: exactly those that plain enumeration finds, without one being made."""

from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.reducers as pml_reducers
import torch
from torch import Tensor

from gradbank import distances, engine, losses, miners, reducers
from gradbank.engine import Anchors, Bounds, Part

MARGIN = 0.25
THRESHOLDS: dict[str, dict[str, float]] = {
    "above 0": {"low": 0.0},
    "above": {"low": 0.5},
    "below": {"high": 0.75},
    "between": {"low": 0.25, "high": 1.25},
    "below 0": {"high": 0.0},
    "above a negative": {"low": -1.0},
    "nothing between": {"low": 0.5, "high": 0.5},
    "far above": {"low": 100.0},
}


class CountedTriplets(losses.TripletMarginLoss):
    """A triplet loss that remembers what it reduced: the sum of the triplets that counted, and how many did."""

    def terms(self, anchors: Anchors) -> Any:
        made = super().terms(anchors)
        self.__dict__.setdefault("parts", []).append(made["loss"])
        return made

    def total(self, *call: Any) -> tuple[float, float]:
        """The sum and the number of a call."""
        self.__dict__["parts"] = []
        self(*call)
        parts: list[Part] = self.__dict__["parts"]
        return sum(float(p.losses.detach().sum()) for p in parts), sum(float(p.counts.sum()) for p in parts)


def enumerated(loss: CountedTriplets, mat: Tensor, labels: Tensor, ref_labels: Tensor | None) -> tuple[float, int]:
    """The sum and number of the triplets that count, each written out, in the matrix's own precision."""
    low, high = loss.reducer.bounds
    total, count = 0.0, 0
    known = labels if ref_labels is None else ref_labels
    for a, row in enumerate(mat):
        for p in (known == labels[a]).nonzero()[:, 0].tolist():
            if ref_labels is None and p == a:
                continue
            violations = torch.relu(loss.distance.margin(row[p], row) + loss.margin)
            counted = known != labels[a]
            counted &= torch.ones_like(counted) if low is None else violations > low
            counted &= torch.ones_like(counted) if high is None else violations < high
            total += float(violations[counted].double().sum())
            count += int(counted.sum())
    return total, count


@pytest.fixture(params=["dense", "tiled", "small tiles"])
def forced(request: pytest.FixtureRequest) -> Iterator[None]:
    small = Bounds(tile=7, rows=3, positives=5) if request.param == "small tiles" else None
    with engine.using("dense" if request.param == "dense" else "tiled", small):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("distance", ["L1", "dot"])
@pytest.mark.usefixtures("forced")
def test_ties_on_a_grid_count_as_enumerated(distance: str, threshold: str, dtype: torch.dtype) -> None:
    """On a grid of quarters everything is exact: many triplets violate by the threshold itself."""
    torch.manual_seed(0)
    made = {
        "L1": distances.LpDistance(normalize_embeddings=False, p=1),
        "dot": distances.DotProductSimilarity(normalize_embeddings=False),
    }[distance]
    loss = CountedTriplets(MARGIN, distance=made, reducer=reducers.ThresholdReducer(**THRESHOLDS[threshold]))
    for _ in range(4):
        embeddings, labels = torch.randint(-2, 3, (18, 2)).to(dtype) / 2, torch.randint(4, (18,))
        ref_emb, ref_labels = torch.randint(-2, 3, (23, 2)).to(dtype) / 2, torch.randint(4, (23,))
        wanted = enumerated(loss, made(embeddings), labels, None)
        assert loss.total(embeddings, labels) == wanted
        wanted = enumerated(loss, made(embeddings, ref_emb), labels, ref_labels)
        assert loss.total(embeddings, labels, None, ref_emb, ref_labels) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("engine_name", ["dense", "tiled"])
def test_rounded_distances_count_as_enumerated(engine_name: str, threshold: str, dtype: torch.dtype) -> None:
    """Duplicated rows, and margins that equal a difference up to its last bit."""
    torch.manual_seed(1)
    for seed in range(6):
        rows = torch.randn(20, 3, dtype=dtype)[torch.randint(20, (24,))]
        labels = torch.randint(4, (24,))
        for made in (distances.LpDistance(), distances.CosineSimilarity(), distances.LpDistance(power=2)):
            mat = made(rows)
            margins = [0.05, 0.0] + [float(mat[seed, n] - mat[seed, 23 - n]) for n in range(4)]
            for margin in margins:
                loss = CountedTriplets(
                    margin, distance=made, reducer=reducers.ThresholdReducer(**THRESHOLDS[threshold])
                )
                total, count = enumerated(loss, mat, labels, None)
                with engine.using(engine_name):
                    found = loss.total(rows, labels)
                assert found[1] == count
                assert found[0] == pytest.approx(total, rel=1e-6 if dtype == torch.float32 else 1e-13, abs=1e-5)


def pml_of(loss: losses.TripletMarginLoss, **reducer: float) -> Any:
    return pml_losses.TripletMarginLoss(
        loss.margin, distance=pml_distances.LpDistance(), reducer=pml_reducers.ThresholdReducer(**reducer)
    )


@pytest.mark.parametrize("threshold", ["above 0", "above", "below", "between"])
@pytest.mark.parametrize("references", [False, True])
def test_listed_triplets_equal_those_of_pml(threshold: str, references: bool) -> None:
    torch.manual_seed(2)
    embeddings, ref_emb = torch.randn(12, 4, dtype=torch.float64), torch.randn(15, 4, dtype=torch.float64)
    size = 15 if references else 12
    listed = torch.randint(12, (60,)), torch.randint(size, (60,)), torch.randint(size, (60,))
    loss = losses.TripletMarginLoss(MARGIN, reducer=reducers.ThresholdReducer(**THRESHOLDS[threshold]))
    labels, ref_labels = torch.arange(12), torch.arange(15)
    rest = (ref_emb, ref_labels) if references else ()
    gradients = []
    for each in (loss, pml_of(loss, **THRESHOLDS[threshold])):
        leaf = embeddings.clone().requires_grad_()
        value = each(leaf, labels, listed, *rest)
        value.backward()
        gradients.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_pairs_are_joined_on_equal_anchors() -> None:
    torch.manual_seed(3)
    embeddings, labels = torch.randn(24, 4, dtype=torch.float64), torch.randint(4, (24,))
    listed = miners.MultiSimilarityMiner()(embeddings, labels)
    a1, p, a2, n = listed
    positive, negative = (a1[:, None] == a2).nonzero(as_tuple=True)
    loss = losses.TripletMarginLoss(MARGIN)
    value = loss(embeddings, labels, listed)
    assert value > 0
    triplets = a1[positive], p[positive], n[negative]
    torch.testing.assert_close(value, loss(embeddings, labels, triplets), rtol=1e-12, atol=0)
    torch.testing.assert_close(value, pml_of(loss, low=0)(embeddings, labels, listed), rtol=1e-9, atol=0)


def test_a_triplet_named_twice_counts_twice() -> None:
    torch.manual_seed(4)
    embeddings = torch.randn(6, 4, dtype=torch.float64)
    one, other = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    loss = losses.TripletMarginLoss(2.0, reducer=reducers.MeanReducer())

    def of(*triplets: Tensor) -> Tensor:
        value: Tensor = loss(embeddings, None, tuple(torch.stack(triplets).T))
        return value

    torch.testing.assert_close(of(one, one, other), (2 * of(one) + of(other)) / 3, rtol=1e-12, atol=0)
    pairs = (torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([0, 0, 0]), torch.tensor([2, 2, 3]))
    joined = [torch.tensor([0, 1, each]) for each in (2, 2, 3)] * 2
    torch.testing.assert_close(loss(embeddings, None, pairs), of(*joined), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (([0], [1], [6]), "negatives 6 to 6, but must stay within 0..5"),
        (([-1], [1], [2]), "anchors -1 to -1"),
        (([0, 1], [1, 2], [2]), "of one length, got 2, 2 and 1"),
        (([0], [1]), r"\(a, p, n\) or \(a1, p, a2, n\), got 2 tensors"),
    ],
)
def test_triplets_that_do_not_fit_are_refused(listed: tuple[list[int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.TripletMarginLoss()(torch.randn(6, 4), None, tuple(torch.tensor(each) for each in listed))
