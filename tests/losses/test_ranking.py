"""FastAP, Smooth-AP, PNP and ranked lists: against PML, and against plain loops where PML is wrong."""

import math
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.reducers as pml_reducers
import torch
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices, get_all_triplets_indices
from torch import Tensor
from torch.nn import functional as F

from gradbank import distances, engine, reducers
from gradbank.engine import Bounds, ranks
from gradbank.losses import ranking

Answer = tuple[Tensor, Tensor]

LABELS = torch.tensor([3, 1, 3, 0, 1, 3, 7, 1, 0, 9, 2, 2, 2, 2, 2, 2, 0, 4, 4, 3])  # 7 and 9 are alone
RECIPES: list[tuple[str, dict[str, Any]]] = [
    ("FastAPLoss", {}),
    ("FastAPLoss", {"num_bins": 3}),
    ("RankedListLoss", {"margin": 0.4, "Tn": 3}),
    ("RankedListLoss", {"margin": 0.8, "Tn": 0, "imbalance": 0.2, "alpha": 1.5, "Tp": 2}),
    *(("PNPLoss", {"variant": variant, "anneal": 0.1}) for variant in ("O", "Ds", "Iu")),
    ("PNPLoss", {"variant": "Dq", "alpha": 2, "anneal": 0.05}),
    ("PNPLoss", {"variant": "Ib", "b": 3}),
]
REDUCERS = {
    "sum": lambda m: m.SumReducer(),
    "above 0": lambda m: m.AvgNonZeroReducer(),
    "between": lambda m: m.ThresholdReducer(low=0.1, high=0.8),
    "by class": lambda m: m.ClassWeightedReducer(weights=torch.arange(10) / 4),
    "by anchor": lambda m: m.PerAnchorReducer(),
}


def embeddings(dtype: torch.dtype = torch.float64, rows: int = len(LABELS)) -> Tensor:
    return torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def answer(loss: Any, rows: Tensor, *call: Any) -> Answer:
    leaf = rows.clone().requires_grad_()
    value = loss(leaf, *call)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def assert_same(found: Answer, wanted: Answer, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol, check_dtype=False)


def smooth_ap_in_a_loop(rows: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The definition: for each query the mean, over its class, of each one's rank there over its rank among all."""
    s, losses = F.normalize(rows, dim=1), []
    s = s @ s.T
    for q, label in enumerate(labels.tolist()):
        own_class = [i for i, other in enumerate(labels.tolist()) if other == label]
        if len(own_class) == 1:
            continue
        precision = torch.zeros((), dtype=rows.dtype)
        for i in own_class:
            before = torch.sigmoid((s[q] - s[q, i]) / temperature)
            rank = 1 + sum(before[j] for j in own_class if j != i)
            precision = precision + rank / (1 + sum(before[j] for j in range(len(rows)) if j != i))
        losses.append(1 - precision / len(own_class))
    return torch.stack(losses).mean()


@pytest.fixture(params=["dense", "tiled", "small tiles", "few positives"])
def forced(request: pytest.FixtureRequest) -> Iterator[None]:
    small = {"small tiles": Bounds(tile=70, rows=7), "few positives": Bounds(tile=70, rows=7, positives=15)}
    with engine.using("dense" if request.param == "dense" else "tiled", small.get(request.param)):
        yield


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(("name", "options"), RECIPES, ids=str)
def test_loss_equals_that_of_pml(name: str, options: dict[str, Any]) -> None:
    ours, theirs = getattr(ranking, name)(**options), getattr(pml_losses, name)(**options)
    assert_same(answer(ours, embeddings(), LABELS), answer(theirs, embeddings(), LABELS))


@pytest.mark.parametrize("bounds", [None, Bounds(tile=400, rows=20)])
@pytest.mark.parametrize(("name", "options"), [*RECIPES, ("SmoothAPLoss", {"temperature": 0.1})], ids=str)
def test_classes_of_few_rows_are_the_same_in_tiles(name: str, options: dict[str, Any], bounds: Bounds | None) -> None:
    """Where positives are few, tiles are not masked: what is not a negative is listed."""
    rows, labels, loss = embeddings(rows=80), torch.arange(80) // 2, getattr(ranking, name)(**options)
    with engine.using("dense"):
        wanted = answer(loss, rows, labels)
    with engine.using("tiled", bounds):
        assert_same(answer(loss, rows, labels), wanted)
    if name != "SmoothAPLoss":
        assert_same(answer(getattr(pml_losses, name)(**options), rows, labels), wanted)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("temperature", [0.01, 0.3])
def test_smooth_ap_equals_its_definition(temperature: float) -> None:
    """PML's groups rows by position, and so is another loss for labels like these."""
    wanted = answer(lambda x: smooth_ap_in_a_loop(x, LABELS, temperature), embeddings())
    assert_same(answer(ranking.SmoothAPLoss(temperature), embeddings(), LABELS), wanted)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", ["SmoothAPLoss", "PNPLoss"])
def test_pairs_are_ranked_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    wanted = answer(getattr(ranking, name)(), embeddings(), LABELS)
    monkeypatch.setattr(ranks, "_AT_ONCE", 10)
    assert_same(answer(getattr(ranking, name)(), embeddings(), LABELS), wanted)


def test_smooth_ap_equals_that_of_pml_where_there_are_as_many_classes_as_members() -> None:
    labels = torch.arange(4).repeat_interleave(4)
    ours, theirs = (
        answer(made(0.1), embeddings(rows=16), labels) for made in (ranking.SmoothAPLoss, pml_losses.SmoothAPLoss)
    )
    assert_same(ours, theirs, rtol=1e-6)  # PML's average precision is float32


def test_smooth_ap_does_not_depend_on_the_order_of_rows() -> None:
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(0))
    value, gradient = answer(ranking.SmoothAPLoss(0.1), embeddings(), LABELS)
    mixed_value, mixed_gradient = answer(ranking.SmoothAPLoss(0.1), embeddings()[order], LABELS[order])
    assert_same((mixed_value, mixed_gradient), (value, gradient[order]))


@pytest.mark.parametrize("power", [1, 2])
def test_fast_ap_takes_any_power_of_the_distance(power: int) -> None:
    ours = ranking.FastAPLoss(7, distance=distances.LpDistance(power=power))
    theirs = pml_losses.FastAPLoss(7, distance=pml_distances.LpDistance(power=power))
    assert_same(answer(ours, embeddings(), LABELS), answer(theirs, embeddings(), LABELS))


@pytest.mark.parametrize("distance", ["squared", "dot"])
def test_ranked_lists_take_any_distance(distance: str) -> None:
    def made(library: ModuleType, measures: ModuleType) -> Any:
        kind = measures.LpDistance(power=2) if distance == "squared" else measures.DotProductSimilarity()
        return library.RankedListLoss(margin=0.4, Tn=1, Tp=1, distance=kind)

    ours, theirs = made(ranking, distances), made(pml_losses, pml_distances)
    assert_same(answer(ours, embeddings(), LABELS), answer(theirs, embeddings(), LABELS))


@pytest.mark.parametrize("kind", REDUCERS)
@pytest.mark.parametrize(("name", "options"), [RECIPES[0], RECIPES[2], RECIPES[4]], ids=str)
def test_reducers_make_the_same_of_it_as_in_pml(name: str, options: dict[str, Any], kind: str) -> None:
    ours = getattr(ranking, name)(**options, reducer=REDUCERS[kind](reducers))
    theirs = getattr(pml_losses, name)(**options, reducer=REDUCERS[kind](pml_reducers))
    assert_same(answer(ours, embeddings(), LABELS), answer(theirs, embeddings(), LABELS))


@pytest.mark.parametrize(
    ("name", "part", "kind"),
    [("FastAPLoss", "loss", "element"), ("SmoothAPLoss", "ap_loss", "element"), ("PNPLoss", "loss", "already_reduced")],
)
def test_parts_have_the_names_of_pml(name: str, part: str, kind: str) -> None:
    parts = getattr(ranking, name)(reducer=reducers.DoNothingReducer())(embeddings(), LABELS)
    assert list(parts) == [part]
    assert parts[part]["reduction_type"] == kind
    if kind == "element":
        assert parts[part]["indices"].tolist() == [i for i, label in enumerate(LABELS.tolist()) if label not in (7, 9)]


@pytest.mark.parametrize("name", ["FastAPLoss", "SmoothAPLoss"])
@pytest.mark.parametrize("form", ["triplets", "pairs", "none"])
def test_indices_weigh_the_anchors(name: str, form: str) -> None:
    labels = torch.arange(4).repeat_interleave(4)
    every = get_all_triplets_indices(labels) if form == "triplets" else get_all_pairs_indices(labels)
    indices = tuple(x[: {"triplets": 60, "pairs": 9, "none": 0}[form]] for x in every)
    ours, theirs = (answer(getattr(m, name)(), embeddings(rows=16), labels, indices) for m in (ranking, pml_losses))
    assert_same(ours, theirs, rtol=1e-6, atol=1e-8)  # PML's average precision is float32
    if form != "none":
        assert not torch.isclose(ours[0], answer(getattr(ranking, name)(), embeddings(rows=16), labels)[0])


@pytest.mark.parametrize(
    "labels", [torch.arange(20), torch.zeros(20, dtype=torch.int64)], ids=["distinct", "one class"]
)
@pytest.mark.parametrize("name", ["FastAPLoss", "SmoothAPLoss", "PNPLoss"])
def test_without_positives_or_negatives_nothing_is_ranked_wrong(name: str, labels: Tensor) -> None:
    value, gradient = answer(getattr(ranking, name)(), embeddings(), labels)
    assert abs(float(value)) < 1e-12
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize(
    "labels", [torch.arange(20), torch.zeros(20, dtype=torch.int64)], ids=["distinct", "one class"]
)
def test_ranked_lists_need_not_have_both_kinds(labels: Tensor) -> None:
    ours, theirs = (answer(m.RankedListLoss(margin=0.4, Tn=1), embeddings(), labels) for m in (ranking, pml_losses))
    assert_same(ours, theirs)
    assert ours[0] > 0


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize(
    ("name", "options"), [*RECIPES[:1], RECIPES[2], RECIPES[4], ("SmoothAPLoss", {})], ids=lambda x: str(x)
)
def test_batch_with_nothing_to_compare_costs_nothing(name: str, options: dict[str, Any], rows: int) -> None:
    value, gradient = answer(getattr(ranking, name)(**options), embeddings()[:rows], LABELS[:rows])
    assert value == 0
    assert not gradient.any()


def test_equal_rows_have_finite_gradients() -> None:
    rows = embeddings()
    rows[[2, 5, 7]] = rows[0].clone()
    for name, options in (*RECIPES, ("SmoothAPLoss", {})):
        value, gradient = answer(getattr(ranking, name)(**options), rows, LABELS)
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(("name", "options"), [*RECIPES, ("SmoothAPLoss", {"temperature": 0.1})], ids=str)
def test_what_is_not_a_number_is_not_hidden(name: str, options: dict[str, Any]) -> None:
    rows = embeddings()
    rows[3, 1] = math.nan
    assert answer(getattr(ranking, name)(**options), rows, LABELS)[0].isnan()


@pytest.mark.parametrize(("name", "options"), [*RECIPES, ("SmoothAPLoss", {"temperature": 0.1})], ids=str)
def test_single_precision_is_as_good_as_its_digits(name: str, options: dict[str, Any]) -> None:
    loss = getattr(ranking, name)(**options)
    wanted = answer(loss, embeddings(), LABELS)
    found = answer(loss, embeddings(torch.float32), LABELS)
    assert found[0].dtype == torch.float32
    assert_same((found[0].double(), found[1].double()), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), [*RECIPES, ("SmoothAPLoss", {})], ids=str)
def test_half_precision_is_computed_in_float32(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    loss = getattr(ranking, name)(**options)
    value, gradient = answer(loss, embeddings(dtype), LABELS)
    assert torch.equal(value, loss(embeddings(dtype).float(), LABELS))
    assert gradient.dtype == dtype


def test_high_temperatures_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="Tp=0 and Tn=6: above 5, the weights may overflow"):
        ranking.RankedListLoss(0.4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranking.RankedListLoss(0.4, 5, Tp=5)


def test_alpha_is_beyond_the_margin_by_default() -> None:
    loss = ranking.RankedListLoss(0.5, 1)
    assert loss.alpha == 1.25
    assert loss.rebuilt().alpha == 1.25


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ranking.FastAPLoss(0), "num_bins must be a whole number from 1 to 10,000, got 0"),
        (lambda: ranking.FastAPLoss(distance=distances.LpDistance(p=1)), r"needs distance=LpDistance\(normalize"),
        (lambda: ranking.FastAPLoss(distance=distances.CosineSimilarity()), "needs distance=LpDistance"),
        (lambda: ranking.SmoothAPLoss(distance=distances.LpDistance()), "needs distance=CosineSimilarity"),
        (lambda: ranking.PNPLoss(distance=distances.LpDistance()), "needs distance=CosineSimilarity"),
        (lambda: ranking.PNPLoss(variant="Dx"), "variant must be one of Ds, Dq, Iu, Ib, O, got 'Dx'"),
        (lambda: ranking.RankedListLoss(0.4, 1, imbalance=1.5), "imbalance must be between 0 and 1, got 1.5"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(("name", "options"), [*RECIPES[:1], RECIPES[2], RECIPES[4], ("SmoothAPLoss", {})], ids=str)
def test_labels_are_needed_and_references_refused(name: str, options: dict[str, Any]) -> None:
    loss, triplets = getattr(ranking, name)(**options), (torch.tensor([0]), torch.tensor([2]), torch.tensor([1]))
    with pytest.raises(ValueError, match="needs labels"):
        loss(embeddings(), indices_tuple=triplets)
    with pytest.raises(ValueError, match="takes no ref_emb"):
        loss(embeddings(), LABELS, ref_emb=embeddings().clone(), ref_labels=LABELS)
    if name in ("PNPLoss", "RankedListLoss"):
        with pytest.raises(ValueError, match="takes no indices_tuple"):
            loss(embeddings(), LABELS, triplets)


@pytest.mark.parametrize("way", ["dense", "tiled"])
def test_a_far_positive_of_a_ranked_list_weighs_all_and_makes_no_nan(way: str) -> None:
    rows = torch.tensor([[1.0, 0.0], [900.0, 0.0], [0.0, 1.0], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    distance = distances.LpDistance(normalize_embeddings=False)
    loss_fn = ranking.RankedListLoss(margin=0.5, Tn=0, Tp=1, imbalance=0, distance=distance)
    with engine.using(way):
        loss = loss_fn(rows, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    excess = torch.tensor([899.0, 899.0, 1.0, 1.0], dtype=torch.float64) - (1.25 - 0.5)
    weight = excess.exp()
    # exp(899) is more than float64 holds: next to it the 1e-5 B of the formula is nothing
    wanted = torch.where(weight.isinf(), excess, weight * excess / (weight + 1e-5 * 4)).mean()
    assert torch.allclose(loss, wanted)
    assert rows.grad is not None
    assert bool(rows.grad.isfinite().all())
