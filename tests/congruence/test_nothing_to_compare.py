"""Anchors that nothing is compared with, and rows without a length: they spoil nothing, and cost nothing."""

from typing import Any

import pytest
import pytorch_metric_learning.losses as pml_losses
import torch
from torch import Tensor, nn

from gradbank import distances, engine, losses, reducers

SMALL = engine.Bounds(tile=24, rows=4)
WAYS = [("dense", None), ("tiled", SMALL)]


class Whole(reducers.BaseReducer):
    """Sums up what it sees."""

    def triplet_reduction(self, losses: Tensor, indices: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
        return losses.sum()

    element_reduction = triplet_reduction


def of(loss: Any, rows: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    leaf = rows.clone().requires_grad_()
    value = loss(leaf, *rest)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def rows(*zero: int) -> Tensor:
    made = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    made[list(zero)] = 0
    return made


@pytest.mark.parametrize(("way", "bounds"), WAYS)
@pytest.mark.parametrize("name", ["ContrastiveLoss", "NTXentLoss", "TripletMarginLoss"])
def test_a_row_without_a_signal_of_which_nothing_is_listed_has_no_gradient(way: Any, bounds: Any, name: str) -> None:
    none = (torch.zeros(0, dtype=torch.int64),) * 4
    with engine.using(way, bounds):
        value, gradient = of(getattr(losses, name)(distance=distances.SNRDistance()), rows(1), torch.arange(6), none)
    assert not value
    assert not bool(gradient.any())


def test_a_row_without_a_signal_is_a_negative_as_any() -> None:
    labels, made = torch.tensor([0, 1, 0, 2, 2, 0]), []
    for way, bounds in WAYS:
        with engine.using(way, bounds):
            made.append(of(losses.TripletMarginLoss(distance=distances.SNRDistance()), rows(1), labels))
    torch.testing.assert_close(*made)
    assert bool(made[0][0].isfinite())


@pytest.mark.parametrize(("way", "bounds"), WAYS)
@pytest.mark.parametrize(
    "indices", [None, tuple(torch.tensor(each) for each in ([0, 2], [1, 3], [2, 3], [4, 5]))], ids=["one class", "some"]
)
def test_a_learned_margin_has_a_gradient_where_anchors_have_no_negative(way: Any, bounds: Any, indices: Any) -> None:
    margin = nn.Parameter(torch.tensor(1.0))
    loss_fn = losses.LiftedStructureLoss()
    loss_fn.neg_margin = margin
    labels = torch.zeros(6, dtype=torch.int64) if indices is None else torch.tensor([0, 0, 1, 1, 2, 3])
    with engine.using(way, bounds):
        loss_fn(rows(), labels, indices).backward()
    if indices is None:
        assert not margin.grad
        return
    theirs, known = pml_losses.LiftedStructureLoss(), nn.Parameter(torch.tensor(1.0))
    theirs.neg_margin = known
    theirs(rows(), labels, indices).backward()
    torch.testing.assert_close(margin.grad, known.grad)


@pytest.mark.parametrize("reducer", [Whole, reducers.SumReducer, reducers.MeanReducer])
def test_a_batch_without_triplets_costs_nothing_whatever_beta_does(reducer: Any) -> None:
    loss_fn = losses.MarginLoss(nu=0.3, learn_beta=True, reducer=reducer())
    value = loss_fn(rows(), torch.arange(6))
    assert value.item() == 0
    if value.requires_grad:
        value.backward()
    assert loss_fn.beta.grad is None or not loss_fn.beta.grad


@pytest.mark.parametrize(("way", "bounds"), WAYS)
@pytest.mark.parametrize("arguments", [{"margin": 0.4, "Tn": 80}, {"margin": 10, "Tn": 16}])
def test_a_weight_that_does_not_count_may_be_infinite(way: Any, bounds: Any, arguments: Any) -> None:
    """Those of an anchor with itself and with its positives: exp(Tn * alpha) and less."""
    unit, labels = torch.nn.functional.normalize(rows()), torch.arange(6) // 2
    with pytest.warns(UserWarning, match="may overflow"):
        loss_fn = losses.RankedListLoss(**arguments)
    wanted = of(loss_fn, unit.double(), labels)
    with engine.using(way, bounds):
        value, gradient = of(loss_fn, unit, labels)
    torch.testing.assert_close(value.double(), wanted[0], rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted[1], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["LargeMarginSoftmaxLoss", "SphereFaceLoss"])
def test_an_angle_is_of_cosines_as_they_are(name: str) -> None:
    with pytest.raises(ValueError, match=r"needs distance=CosineSimilarity\(p=2, power=1\)"):
        getattr(losses, name)(3, 4, distance=distances.CosineSimilarity(power=2))
