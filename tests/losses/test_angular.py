"""The angular loss, against PML."""

from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.miners as pml_miners
import pytorch_metric_learning.reducers as pml_reducers
import torch
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices, get_all_triplets_indices
from torch import Tensor

from gradbank import distances, engine, losses, miners, reducers
from gradbank.engine import Bounds
from gradbank.losses import AngularLoss

LABELS = torch.tensor([3, 1, 3, 0, 1, 3, 7, 1, 0, 9, 2, 2, 2, 8])  # 7, 8 and 9 are alone
REDUCERS = {
    "sum": lambda m: m.SumReducer(),
    "between": lambda m: m.ThresholdReducer(low=2, high=6),
    "by class": lambda m: m.ClassWeightedReducer(weights=torch.arange(10) / 4),
    "by anchor": lambda m: m.PerAnchorReducer(),
    "middle of an anchor": lambda m: m.PerAnchorReducer(aggregation_func=_middle),
}


def _middle(table: Tensor, number: Tensor) -> Tensor:
    return (table.amax(1) + table.sum(1)) / (number + 1)


def embeddings(rows: int = len(LABELS), seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def answer(loss: Any, rows: Tensor, labels: Tensor, indices: Any = None, *references: Tensor) -> list[Tensor]:
    """The value, and the gradients of the embeddings and of `ref_emb`."""
    leaf = rows.clone().requires_grad_()
    others = [references[0].clone().requires_grad_(), *references[1:]] if references else []
    value = loss(leaf, labels, indices, *others)
    value.backward()
    return [value.detach(), *(x.grad for x in (leaf, *others[:1]) if x.grad is not None)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def call_of(form: str) -> tuple[Any, ...]:
    if form == "triplets":
        return LABELS, tuple(torch.cat([x[::7], x[:4]]) for x in get_all_triplets_indices(LABELS))
    if form == "pairs":
        return LABELS, tuple(torch.cat([x[::3], x[:4]]) for x in get_all_pairs_indices(LABELS))
    if form == "references":
        return LABELS, None, embeddings(9, seed=5), LABELS[3:12]
    if form == "references and pairs":
        return LABELS, get_all_pairs_indices(LABELS, LABELS[3:12]), embeddings(9, seed=5), LABELS[3:12]
    return (LABELS,)


BOUNDS = {"small tiles": Bounds(tile=30, rows=4), "few positives": Bounds(tile=30, rows=4, positives=9)}


@pytest.fixture(params=["dense", "tiled", *BOUNDS])
def forced(request: pytest.FixtureRequest) -> Iterator[None]:
    with engine.using("dense" if request.param == "dense" else "tiled", BOUNDS.get(request.param)):
        yield


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("alpha", [40, 25.5])
@pytest.mark.parametrize("form", ["labels", "triplets", "pairs", "references", "references and pairs"])
def test_loss_equals_that_of_pml(form: str, alpha: float) -> None:
    call = call_of(form)
    assert_same(*(answer(m.AngularLoss(alpha), embeddings(), *call) for m in (losses, pml_losses)))


@pytest.mark.parametrize("bounds", [None, Bounds(tile=400, rows=20), Bounds(tile=400, rows=20, positives=100)])
def test_classes_of_few_rows_are_the_same_in_tiles(bounds: Bounds | None) -> None:
    """Where positives are few, tiles are not masked: what is not a negative is listed."""
    rows, labels = embeddings(80), torch.arange(80) // 2
    with engine.using("tiled", bounds):
        ours = answer(AngularLoss(), rows, labels)
    assert_same(ours, answer(pml_losses.AngularLoss(), rows, labels))


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("kind", REDUCERS)
def test_reducers_see_a_loss_of_each_pair(kind: str) -> None:
    """PML's losses are `(P, 1)`, of which its weights make `(P, P)`, and which its mean by anchor refuses."""

    def theirs(rows: Tensor, *call: Any) -> Any:
        parts = pml_losses.AngularLoss(reducer=pml_reducers.DoNothingReducer())(rows, *call)
        parts["loss"]["losses"] = parts["loss"]["losses"].squeeze(1)
        return REDUCERS[kind](pml_reducers)(parts, rows, LABELS)

    ours = AngularLoss(reducer=REDUCERS[kind](reducers))
    assert_same(answer(ours, embeddings(), LABELS), answer(theirs, embeddings(), LABELS))


def test_list_of_losses_names_the_pairs() -> None:
    part: Any = AngularLoss(reducer=reducers.DoNothingReducer())(embeddings(), LABELS)["loss"]
    a, p = part["indices"]
    assert part["reduction_type"] == "pos_pair"
    assert sorted(zip(a.tolist(), p.tolist(), strict=True)) == sorted(
        zip(*(x.tolist() for x in get_all_pairs_indices(LABELS)[:2]), strict=True)
    )


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("mined", [False, True])
def test_queue_equals_that_of_pml(mined: bool) -> None:
    ours, theirs = (
        m.CrossBatchMemory(m.AngularLoss(), 5, 33, miner=k.MultiSimilarityMiner() if mined else None)
        for m, k in ((losses, miners), (pml_losses, pml_miners))
    )
    for seed in range(4):
        rows = embeddings(seed=seed)
        assert_same(answer(ours, rows, LABELS), answer(theirs, rows, LABELS))


def test_lengths_of_negatives_count_as_in_pml() -> None:
    once, thrice = (AngularLoss()(embeddings() * length, LABELS) for length in (1, 3))
    assert thrice > once
    torch.testing.assert_close(thrice, pml_losses.AngularLoss()(embeddings() * 3, LABELS))


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("labels", [torch.arange(14), torch.zeros(14).long()], ids=["distinct", "one class"])
def test_without_positives_or_negatives_the_loss_is_zero(labels: Tensor) -> None:
    value, gradient = answer(AngularLoss(), embeddings(), labels)
    assert value == 0
    assert not gradient.any()


def test_pairs_without_a_negative_cost_nothing_as_in_pml() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    call = LABELS, (torch.tensor([0, 1]), torch.tensor([2, 4]), none, none)
    assert_same(*(answer(m.AngularLoss(), embeddings(), *call) for m in (losses, pml_losses)))


@pytest.mark.parametrize("rows", [0, 1])
def test_batch_with_nothing_to_compare_costs_nothing(rows: int) -> None:
    value, gradient = answer(AngularLoss(), embeddings()[:rows], LABELS[:rows])
    assert value == 0
    assert not gradient.any()


def test_lower_precision_is_as_good_as_its_digits() -> None:
    wanted, found = (answer(AngularLoss(), embeddings(dtype=t), LABELS) for t in (torch.float64, torch.float32))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, check_dtype=False)
    half = embeddings(dtype=torch.float16)
    assert torch.equal(AngularLoss()(half, LABELS), AngularLoss()(half.float(), LABELS))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="AngularLoss needs labels"):
        AngularLoss()(embeddings(), indices_tuple=call_of("triplets")[1])
    for distance in (distances.LpDistance(power=2), distances.CosineSimilarity()):
        with pytest.raises(ValueError, match="needs distance=LpDistance"):
            AngularLoss(distance=distance)


@pytest.mark.parametrize("taken", [(0.0, -1.0), (5.0, -1.0), (0.0, 1.9)], ids=["positives", "none", "both"])
def test_a_queue_whose_miner_takes_no_negative_costs_nothing_as_in_pml(taken: tuple[float, float]) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3) for _ in range(3)]
    ours = losses.CrossBatchMemory(losses.AngularLoss(), 4, 20, miners.PairMarginMiner(*taken)).double()
    theirs = pml_losses.CrossBatchMemory(pml_losses.AngularLoss(), 4, 20, pml_miners.PairMarginMiner(*taken)).double()
    for embeddings, labels in batches:
        found, wanted = ours(embeddings, labels), theirs(embeddings, labels)
        assert (float(wanted) > 0) == (taken[1] > 0)
        torch.testing.assert_close(found, wanted)
