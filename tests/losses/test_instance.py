"""Losses that classify each anchor among as many others, against PML."""

from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.reducers as pml_reducers
import torch
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices, get_all_triplets_indices
from torch import Tensor
from torch.nn import functional as F

from gradbank import distances, engine, losses, reducers, regularizers
from gradbank.engine import Bounds
from gradbank.losses import InstanceLoss, NPairsLoss

Answer = tuple[Tensor, Tensor]

LABELS = torch.tensor([3, 1, 3, 0, 1, 3, 7, 1, 0, 9, 2, 2, 2, 8])  # 7, 8 and 9 are alone
REDUCERS = {
    "sum": lambda m: m.SumReducer(),
    "between": lambda m: m.ThresholdReducer(low=0.5, high=20),
    "by class": lambda m: m.ClassWeightedReducer(weights=torch.arange(10) / 4),
    "by anchor": lambda m: m.PerAnchorReducer(),
}
DISTANCES = {
    "dot": lambda m: m.DotProductSimilarity(normalize_embeddings=False),
    "Lp": lambda m: m.LpDistance(),
    "cosine": lambda m: m.CosineSimilarity(),
}


def embeddings(dtype: torch.dtype = torch.float64, rows: int = len(LABELS)) -> Tensor:
    return torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def answer(loss: Any, rows: Tensor, *call: Any) -> Answer:
    leaf = rows.clone().requires_grad_()
    value = loss(leaf, *call)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def assert_same(found: Answer, wanted: Answer) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def indices_of(form: str) -> Any:
    """Pairs of which not the first of each class, in row order, comes first."""
    order = torch.Generator().manual_seed(3)
    every = get_all_triplets_indices(LABELS) if form == "triplets" else get_all_pairs_indices(LABELS)
    mixed = torch.randperm(min(len(x) for x in every), generator=order)
    return tuple(x[mixed[:12]] for x in every)


@pytest.fixture(params=["dense", "tiled", "small tiles"])
def forced(request: pytest.FixtureRequest) -> Iterator[None]:
    small = Bounds(tile=30, rows=4) if request.param == "small tiles" else None
    with engine.using("dense" if request.param == "dense" else "tiled", small):
        yield


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("gamma", [64, 3])
@pytest.mark.parametrize(
    "labels", [LABELS, torch.arange(14), torch.arange(14).flip(0), torch.zeros(14).long()], ids=str
)
def test_instance_loss_equals_that_of_pml(gamma: float, labels: Tensor) -> None:
    assert_same(*(answer(m.InstanceLoss(gamma), embeddings(), labels) for m in (losses, pml_losses)))


def test_instance_loss_classifies_each_row_as_itself_where_labels_count_the_rows() -> None:
    unit = F.normalize(embeddings(), dim=1)
    wanted = F.cross_entropy(10 * unit @ unit.T, torch.arange(14))
    torch.testing.assert_close(InstanceLoss(10)(embeddings(), torch.arange(100, 114)), wanted)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("form", ["labels", "triplets", "pairs"])
def test_n_pairs_loss_equals_that_of_pml(form: str, distance: str) -> None:
    indices = None if form == "labels" else indices_of(form)
    ours = losses.NPairsLoss(distance=DISTANCES[distance](distances))
    theirs = pml_losses.NPairsLoss(distance=DISTANCES[distance](pml_distances))
    assert_same(answer(ours, embeddings(), LABELS, indices), answer(theirs, embeddings(), LABELS, indices))


@pytest.mark.parametrize("bounds", [None, Bounds(tile=400, rows=20)])
@pytest.mark.parametrize("name", ["InstanceLoss", "NPairsLoss"])
def test_many_classes_are_the_same_in_tiles(name: str, bounds: Bounds | None) -> None:
    rows, labels = embeddings(rows=80), torch.arange(80) // 2
    with engine.using("tiled", bounds):
        ours = answer(getattr(losses, name)(), rows, labels)
    assert_same(ours, answer(getattr(pml_losses, name)(), rows, labels))


def test_n_pairs_are_the_first_two_rows_of_each_class() -> None:
    unit = F.normalize(embeddings(), dim=1)
    a, p = [3, 1, 10, 0], [8, 4, 11, 2]  # of the labels 0, 1, 2 and 3
    wanted = F.cross_entropy(unit[a] @ unit[p].T, torch.arange(4))
    torch.testing.assert_close(NPairsLoss()(embeddings(), LABELS), wanted)


@pytest.mark.parametrize("kind", REDUCERS)
@pytest.mark.parametrize("name", ["InstanceLoss", "NPairsLoss"])
def test_reducers_make_the_same_of_it_as_in_pml(name: str, kind: str) -> None:
    ours = getattr(losses, name)(reducer=REDUCERS[kind](reducers))
    theirs = getattr(pml_losses, name)(reducer=REDUCERS[kind](pml_reducers))
    assert_same(answer(ours, embeddings(), LABELS), answer(theirs, embeddings(), LABELS))


@pytest.mark.parametrize("name", ["InstanceLoss", "NPairsLoss"])
def test_list_of_losses_names_the_rows_as_in_pml(name: str) -> None:
    ours = getattr(losses, name)(reducer=reducers.DoNothingReducer())(embeddings(), LABELS)["loss"]
    theirs = getattr(pml_losses, name)(reducer=pml_reducers.DoNothingReducer())(embeddings(), LABELS)["loss"]
    assert ours["indices"].tolist() == theirs["indices"].tolist()
    torch.testing.assert_close(ours["losses"], theirs["losses"])


@pytest.mark.parametrize("reducer", [reducers.MeanReducer(), reducers.PerAnchorReducer(aggregation_func=torch.mul)])
def test_n_pairs_of_distinct_labels_are_none(reducer: reducers.Reducer) -> None:
    value, gradient = answer(NPairsLoss(reducer=reducer), embeddings(), torch.arange(14))
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", ["InstanceLoss", "NPairsLoss"])
@pytest.mark.parametrize("rows", [0, 1])
def test_batch_with_nothing_to_compare_costs_nothing(name: str, rows: int) -> None:
    value, gradient = answer(getattr(losses, name)(), embeddings()[:rows], LABELS[:rows])
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", ["InstanceLoss", "NPairsLoss"])
def test_regularizer_is_of_the_whole_batch(name: str) -> None:
    cost = regularizers.LpRegularizer()
    found = getattr(losses, name)(embedding_regularizer=cost)(embeddings(), LABELS)
    torch.testing.assert_close(found, getattr(losses, name)()(embeddings(), LABELS) + cost(embeddings()))


@pytest.mark.parametrize("name", ["InstanceLoss", "NPairsLoss"])
def test_lower_precision_is_as_good_as_its_digits(name: str) -> None:
    loss = getattr(losses, name)()
    wanted, found = (answer(loss, embeddings(dtype), LABELS) for dtype in (torch.float64, torch.float32))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, check_dtype=False)
    half = embeddings(torch.float16)
    assert torch.equal(loss(half, LABELS), loss(half.float(), LABELS))


def test_call_that_does_not_fit_is_refused() -> None:
    triplets = indices_of("triplets")
    for name in ("InstanceLoss", "NPairsLoss"):
        with pytest.raises(ValueError, match="needs labels"):
            getattr(losses, name)()(embeddings(), indices_tuple=triplets)
        with pytest.raises(ValueError, match="takes no ref_emb"):
            getattr(losses, name)()(embeddings(), LABELS, ref_emb=embeddings().clone(), ref_labels=LABELS)
    with pytest.raises(ValueError, match="takes no indices_tuple"):
        InstanceLoss()(embeddings(), LABELS, triplets)
    with pytest.raises(ValueError, match="needs distance=CosineSimilarity"):
        InstanceLoss(distance=distances.LpDistance())
    with pytest.raises(ValueError, match=r"positives 3 to 14, but must stay within 0\.\.13"):
        NPairsLoss()(embeddings(), LABELS, tuple(torch.tensor(x) for x in ([0, 1], [3, 14], [0, 1])))
    with pytest.raises(ValueError, match=r"got \(2,\) anchors and \(1,\) references"):
        NPairsLoss()(embeddings(), LABELS, tuple(torch.tensor(x) for x in ([0, 1], [3], [0, 1])))
