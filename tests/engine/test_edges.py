"""Batches at the edge: nothing to compare, all alike, all different, and where gradbank leaves PML on purpose."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_metric_learning.losses as pml_losses
import torch
from torch import Tensor

from gradbank import engine, losses
from gradbank.engine import Bounds

LOSSES = ("ContrastiveLoss", "MultiSimilarityLoss", "NTXentLoss", "SupConLoss", "TripletMarginLoss")
LABELS = {
    "all distinct": list(range(9)),
    "one label": [3] * 9,
    "one pair": [0, 0, 1, 2, 3, 4, 5, 6, 7],
    "one odd": [0] * 8 + [1],
    "two classes": [0, 1] * 4 + [0],
}


@pytest.fixture(params=["dense", "small tiles"], autouse=True)
def forced(request: pytest.FixtureRequest) -> Iterator[None]:
    small = Bounds(tile=7, rows=2, positives=3)
    with engine.using("dense") if request.param == "dense" else engine.using("tiled", small):
        yield


def answer(loss: Any, embeddings: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, *rest)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def assert_equals_pml(recipe: Any, embeddings: Tensor, *rest: Any) -> None:
    value, gradient = answer(recipe.ours(), embeddings, *rest)
    theirs = answer(recipe.theirs(), embeddings, *rest)
    assert value.isfinite()
    assert gradient.isfinite().all()
    torch.testing.assert_close(value, theirs[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, theirs[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("labels", LABELS)
def test_labels_at_the_edge_give_the_value_of_pml(recipe: Any, labels: str) -> None:
    torch.manual_seed(0)
    batch = torch.randn(9, 4, dtype=torch.float64) * 0.5, torch.tensor(LABELS[labels])
    if (recipe.loss, labels) == ("SupConLoss", "one label") and recipe.reducer != "between":
        # see test_supcon_without_negatives_is_still_a_cross_entropy
        assert recipe.theirs()(*batch) == 0
        assert recipe.ours()(*batch) > 1
    else:
        assert_equals_pml(recipe, *batch)


@pytest.mark.parametrize("label", [[0], []], ids=["one row", "no row"])
def test_batch_too_small_for_a_pair_costs_nothing(recipe: Any, label: list[int]) -> None:
    embeddings = torch.randn(len(label), 4, dtype=torch.float64)
    value, gradient = answer(recipe.ours(), embeddings, torch.tensor(label, dtype=torch.int64))
    assert value == 0
    assert gradient.shape == embeddings.shape
    assert not gradient.any()


def test_no_references_cost_nothing(recipe: Any) -> None:
    embeddings, labels = torch.randn(5, 4, dtype=torch.float64), torch.arange(5)
    empty = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    value, gradient = answer(recipe.ours(), embeddings, labels, None, empty, labels[:0])
    assert value == 0
    assert not gradient.any()
    assert empty.grad is not None


def test_equal_rows_give_the_value_of_pml(recipe: Any) -> None:
    """Distances of 0, whose square root has no slope: they pull in no direction."""
    torch.manual_seed(1)
    rows = torch.randn(4, 4, dtype=torch.float64) * 0.5
    assert_equals_pml(recipe, rows[[0, 1, 2, 3, 0, 1, 0, 2]], torch.tensor([0, 1, 2, 0, 0, 1, 3, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loss_is_finite_wherever_rows_are_zero_or_alike(recipe: Any, dtype: torch.dtype) -> None:
    for rows in (torch.zeros(6, 4), torch.ones(6, 4), torch.full((6, 4), 1e-4)):
        value, gradient = answer(recipe.ours(), rows.to(dtype), torch.tensor([0, 0, 1, 1, 2, 3]))
        assert value.isfinite()
        assert value.dtype == torch.float32
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


def test_supcon_without_negatives_is_still_a_cross_entropy() -> None:
    """PML says 0: its GenericPairLoss gives up where either kind of pair is missing."""
    torch.manual_seed(0)
    embeddings, labels = torch.randn(6, 4, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    s = (unit @ unit.T / 0.1).tolist()
    costs = []
    for a in range(6):
        others = [b for b in range(6) if b != a]
        everyone = math.log(sum(math.exp(s[a][b]) for b in others))
        costs.append(sum(everyone - s[a][p] for p in others) / 5)
    assert pml_losses.SupConLoss()(embeddings, labels) == 0
    value, gradient = answer(losses.SupConLoss(), embeddings, labels)
    assert float(value) == pytest.approx(sum(costs) / 6, rel=1e-12)
    assert gradient.any()


@pytest.mark.parametrize("loss", ["MultiSimilarityLoss", "NTXentLoss", "SupConLoss", "ContrastiveLoss"])
def test_one_positive_and_one_negative_pair_are_enough(loss: str) -> None:
    """PML's GenericPairLoss says 0 to a single pair of each kind."""
    torch.manual_seed(0)
    embeddings = torch.randn(5, 4, dtype=torch.float64)
    listed = tuple(torch.tensor([each]) for each in (1, 3, 1, 4))
    near, far = (float(torch.cosine_similarity(embeddings[1], embeddings[each], dim=0)) for each in (3, 4))
    wanted = {
        # the mean over the batch, of which one row costs
        "MultiSimilarityLoss": (softplus(-2 * (near - 0.5)) / 2 + softplus(50 * (far - 0.5)) / 50) / 5,
        "NTXentLoss": softplus((far - near) / 0.07),
        "SupConLoss": softplus((far - near) / 0.1),
        "ContrastiveLoss": math.sqrt(2 - 2 * near) + max(1 - math.sqrt(2 - 2 * far), 0),
    }[loss]
    value, gradient = answer(getattr(losses, loss)(), embeddings, None, listed)
    assert float(value) == pytest.approx(wanted, rel=1e-9)
    assert gradient.any()


def test_cold_ntxent_keeps_its_gradient() -> None:
    """PML adds the smallest float inside the logarithm: it says 87.3 here, and nothing flows back."""
    embeddings = torch.tensor([[1.0, 0.0], [-1.0, 0.02], [1.0, 0.01], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 2])
    value, gradient = answer(losses.NTXentLoss(0.01), embeddings, labels)
    exact, exact_gradient = answer(losses.NTXentLoss(0.01), embeddings.double(), labels)
    theirs, none = answer(pml_losses.NTXentLoss(0.01), embeddings, labels)
    assert float(theirs) == pytest.approx(87.3, abs=0.1)
    assert none.norm() < 1e-3
    unit = (embeddings / embeddings.norm(dim=1, keepdim=True)).double()
    s = (unit @ unit.T / 0.01).tolist()
    costs = [
        math.log(sum(math.exp(s[a][b] - 100) for b in (p, 2, 3))) + 100 - s[a][p] for a, p in ((0, 1), (1, 0))
    ]  # fmt: skip
    assert float(value) == pytest.approx(sum(costs) / 2, rel=1e-5)
    assert float(exact) == pytest.approx(sum(costs) / 2, rel=1e-6)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-3, atol=1e-3)
    assert gradient.norm() > 1
