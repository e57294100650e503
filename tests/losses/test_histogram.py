"""The histogram loss: against the definition written out, and against PML as far as its float32 bins go."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_metric_learning.losses as pml_losses
import torch
from pytorch_metric_learning.utils.loss_and_miner_utils import (
    convert_to_triplets,
    get_all_pairs_indices,
    get_all_triplets_indices,
)
from torch import Tensor
from torch.nn import functional as F

from gradbank import engine, reducers, regularizers
from gradbank.engine import Bounds
from gradbank.losses import HistogramLoss

Answer = tuple[Tensor, Tensor]

LABELS = torch.tensor([3, 1, 3, 0, 1, 3, 7, 1, 0, 9, 2, 2, 2, 8])  # 7, 8 and 9 are alone


def embeddings(dtype: torch.dtype = torch.float64, rows: int = len(LABELS)) -> Tensor:
    return torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def answer(loss: Any, rows: Tensor, *call: Any) -> Answer:
    leaf = rows.clone().requires_grad_()
    value = loss(leaf, *call)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def in_a_loop(rows: Tensor, triplets: Any, delta: float) -> Tensor:
    """The definition: each unordered pair of a triplet is shared between the two nodes that it lies between."""
    unit = F.normalize(rows, dim=1)
    densities = []
    for one, other in ((0, 1), (0, 2)):
        pairs = {tuple(sorted((int(t[one]), int(t[other])))) for t in zip(*triplets, strict=True)}
        density = [torch.zeros((), dtype=rows.dtype) for _ in range(math.ceil(2 / delta - 1e-6) + 1)]
        for i, j in pairs:
            place = ((unit[i] @ unit[j]).clamp(-1, 1) + 1) / delta
            node = min(int(place), len(density) - 2)
            density[node] = density[node] + (node + 1 - place) / len(pairs)
            density[node + 1] = density[node + 1] + (place - node) / len(pairs)
        densities.append(torch.stack(density))
    return (densities[1] * densities[0].cumsum(0)).sum()


def indices_of(form: str) -> Any:
    """A few triplets, or pairs that are not all in triplets, some of them listed twice or the other way around."""
    seed = torch.Generator().manual_seed(2)
    if form == "triplets":
        every = get_all_triplets_indices(LABELS)
        chosen = torch.randperm(len(every[0]), generator=seed)[:25]
        a, p, n = (torch.cat([x[chosen], x[chosen[:5]]]) for x in every)
        return torch.cat([a, p]), torch.cat([p, a]), torch.cat([n, n])
    a1, p, a2, n = get_all_pairs_indices(LABELS)
    one, two = torch.randperm(len(a1), generator=seed)[:8], torch.randperm(len(a2), generator=seed)[:20]
    return a1[one], p[one], a2[two], n[two]


@pytest.fixture(params=["dense", "tiled", "small tiles"])
def forced(request: pytest.FixtureRequest) -> Iterator[None]:
    small = Bounds(tile=30, rows=4) if request.param == "small tiles" else None
    with engine.using("dense" if request.param == "dense" else "tiled", small):
        yield


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("delta", [0.02, 0.3, 0.9, 2])
@pytest.mark.parametrize("form", ["labels", "triplets", "pairs"])
def test_loss_equals_its_definition(form: str, delta: float) -> None:
    """PML is no oracle at float64: it counts bins in float32."""
    indices = None if form == "labels" else indices_of(form)
    triplets = convert_to_triplets(indices, LABELS, t_per_anchor="all")
    wanted = answer(lambda x: in_a_loop(x, triplets, delta), embeddings())
    found = answer(HistogramLoss(delta=delta), embeddings(), LABELS, indices)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bounds", [None, Bounds(tile=400, rows=20)])
def test_classes_of_few_rows_are_the_same_in_tiles(bounds: Bounds | None) -> None:
    """Where positives are few, tiles are not masked: what is not a negative is listed."""
    rows, labels = embeddings(rows=80), torch.arange(80) // 2
    labels[3:9] += 100
    with engine.using("dense"):
        wanted = answer(HistogramLoss(), rows, labels)
    with engine.using("tiled", bounds):
        torch.testing.assert_close(answer(HistogramLoss(), rows, labels), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("options", [{}, {"n_bins": 7}, {"delta": 0.4}, {"n_bins": 10, "delta": 0.2}], ids=str)
@pytest.mark.parametrize("form", ["labels", "triplets", "pairs"])
def test_loss_equals_that_of_pml(form: str, options: dict[str, Any]) -> None:
    indices = None if form == "labels" else indices_of(form)
    found, wanted = (
        answer(made(**options), embeddings(), LABELS, indices) for made in (HistogramLoss, pml_losses.HistogramLoss)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


def test_equal_rows_count_at_the_last_node() -> None:
    """Their similarity is 1, or a rounding more: PML raises IndexError."""
    rows = embeddings(torch.float32)
    rows[2], rows[4], rows[11] = rows[0].clone(), rows[1].clone(), rows[0].clone()
    found = answer(HistogramLoss(), rows, LABELS)
    wanted = answer(lambda x: in_a_loop(x, get_all_triplets_indices(LABELS), 0.02), rows.double())
    assert found[1].isfinite().all()
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=0)


def test_labels_may_be_left_out_with_triplets() -> None:
    triplets, loss = indices_of("triplets"), HistogramLoss()
    assert torch.equal(loss(embeddings(), indices_tuple=triplets), loss(embeddings(), LABELS, triplets))


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("labels", [torch.arange(14), torch.zeros(14).long()], ids=["distinct", "one class"])
def test_without_triplets_the_loss_is_zero(labels: Tensor) -> None:
    value, gradient = answer(HistogramLoss(), embeddings(), labels)
    assert value == 0
    assert not gradient.any()


def test_pairs_that_make_no_triplet_do_not_count() -> None:
    apart = torch.tensor([0]), torch.tensor([2]), torch.tensor([1]), torch.tensor([3])
    value, gradient = answer(HistogramLoss(), embeddings(), LABELS, apart)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_batch_with_nothing_to_compare_costs_nothing(rows: int) -> None:
    value, gradient = answer(HistogramLoss(), embeddings()[:rows], LABELS[:rows])
    assert value == 0
    assert not gradient.any()


def test_it_is_reduced_already() -> None:
    wanted = HistogramLoss()(embeddings(), LABELS)
    for reducer in (reducers.SumReducer(), reducers.ThresholdReducer(low=5), reducers.PerAnchorReducer()):
        assert torch.equal(HistogramLoss(reducer=reducer)(embeddings(), LABELS), wanted)
    parts: Any = HistogramLoss(reducer=reducers.DoNothingReducer())(embeddings(), LABELS)
    assert torch.equal(parts["loss"]["losses"], wanted)
    cost = regularizers.LpRegularizer()
    regularized = HistogramLoss(embedding_regularizer=cost)(embeddings(), LABELS)
    torch.testing.assert_close(regularized, wanted + cost(embeddings()))  # of all rows, those alone too


def test_single_precision_is_as_good_as_its_digits() -> None:
    wanted, found = (answer(HistogramLoss(n_bins=10), embeddings(t), LABELS) for t in (torch.float64, torch.float32))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_half_precision_is_computed_in_float32() -> None:
    rows = embeddings(torch.float16)
    assert torch.equal(HistogramLoss()(rows, LABELS), HistogramLoss()(rows.float(), LABELS))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"n_bins": 10, "delta": 0.4}, AssertionError, "2 / n_bins if both are given, got n_bins=10 and delta=0.4"),
        ({"n_bins": 0}, ValueError, "n_bins must be a whole number from 1 to 10,000"),
        ({"delta": 0}, ValueError, "delta must be from 0.0002 to 2, got 0"),
        ({"delta": 3}, ValueError, "delta must be from 0.0002 to 2, got 3"),
    ],
)
def test_bins_that_do_not_fit_are_refused(options: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        HistogramLoss(**options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "needs labels, or an indices_tuple"),
        ({"labels": LABELS, "ref_emb": torch.ones(2, 4), "ref_labels": torch.ones(2)}, "takes no ref_emb"),
        ({"indices_tuple": (torch.tensor([0]), torch.tensor([14]), torch.tensor([1]))}, "0..13"),
        ({"indices_tuple": (torch.tensor([0]), torch.tensor([1, 2]), torch.tensor([1]))}, "a positive pair is"),
    ],
)
def test_call_that_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HistogramLoss()(embeddings(), **call)
