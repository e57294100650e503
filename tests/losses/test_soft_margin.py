"""The dynamic soft margin: PML's first call, and the definition written out for those after it."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_metric_learning.losses as pml_losses
import torch
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices, get_all_triplets_indices
from torch import Tensor
from torch.nn import functional as F

from gradbank import distances, engine, errors, losses, reducers
from gradbank.engine import Bounds
from gradbank.losses import DynamicSoftMarginLoss, soft_margin

Answer = tuple[Tensor, ...]

LABELS = torch.tensor([3, 1, 3, 0, 1, 3, 7, 1, 0, 9, 2, 2, 2, 2, 8])
OPTIONS: list[dict[str, Any]] = [{}, {"num_bins": 25}, {"num_bins": 10, "min_val": -3.0}]


def embeddings(rows: int = len(LABELS), seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.randn(rows, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (made + 0.5).to(dtype)  # not so far apart that a difference is past the last node, where PML raises


def answer(loss: Any, rows: Tensor, labels: Tensor | None = None, indices: Any = None, *references: Tensor) -> Answer:
    """The value, the histogram after the call, and the gradients of the embeddings and of `ref_emb`."""
    leaf = rows.clone().requires_grad_()
    others = [references[0].clone().requires_grad_(), *references[1:]] if references else []
    value = loss(leaf, labels, indices, *others)
    value.backward()
    return value.detach(), loss.hist_.detach(), *(x.grad for x in (leaf, *others[:1]) if x.grad is not None)


def assert_same(found: Answer, wanted: Answer) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


class InALoop:
    """The definition: every triplet's difference, shared between two nodes of a histogram, which weighs it."""

    def __init__(self, min_val: float = -2.0, num_bins: int = 10, momentum: float = 0.01) -> None:
        self.low, self.step, self.momentum = min_val, 2 * abs(min_val) / num_bins, momentum
        self.hist_ = torch.zeros(num_bins, dtype=torch.float64)

    def __call__(
        self, rows: Tensor, labels: Tensor | None, indices: Any = None, ref_emb: Tensor | None = None
    ) -> Tensor:
        unit = F.normalize(rows, dim=1)
        if labels is None:
            assert ref_emb is not None
            return self.of_differences(self.of_views(unit, F.normalize(ref_emb, dim=1)))
        a, p, n = get_all_triplets_indices(labels)
        return self.of_differences((unit[a] - unit[p]).norm(dim=1) - (unit[a] - unit[n]).norm(dim=1))

    def of_views(self, unit: Tensor, others: Tensor) -> Tensor:
        """The distance of each pair minus the smallest other in its row or column, 0 for rows without a partner."""
        d = (unit[:, None] - others).norm(dim=2)
        made = [d.new_zeros(())] * max(d.shape)
        for i in range(min(d.shape)):
            rest = [d[i, j] for j in range(d.shape[1]) if j != i] + [d[j, i] for j in range(d.shape[0]) if j != i]
            made[i] = d[i, i] - torch.stack(rest).min()
        return torch.stack(made)

    def of_differences(self, x: Tensor) -> Tensor:
        last = len(self.hist_) - 1
        place = ((x - self.low) / self.step).clamp(0, last)  # beyond the ends it counts as the ends
        node = place.detach().floor().long()
        made = torch.zeros_like(self.hist_)
        for i, at in enumerate(node.tolist()):
            shares = torch.zeros_like(made)
            shares[at] = 1 - (place[i] - at)
            if at < last:
                shares[at + 1] = place[i] - at
            made = made + shares
        momentum = self.momentum if self.hist_.any() else 1.0
        made = (1 - momentum) * self.hist_ + momentum * made
        made = made / made.sum()
        self.hist_ = made.detach()
        return (made.cumsum(0)[node] * x).mean()


@pytest.fixture(params=["dense", "tiled", "small tiles"])
def forced(request: pytest.FixtureRequest) -> Iterator[None]:
    small = Bounds(tile=30, rows=4) if request.param == "small tiles" else None
    with engine.using("dense" if request.param == "dense" else "tiled", small):
        yield


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("form", ["labels", "triplets", "pairs", "references"])
def test_first_call_equals_that_of_pml(form: str, options: dict[str, Any]) -> None:
    call: tuple[Any, ...] = (LABELS,)
    if form == "triplets":
        call = (LABELS, tuple(torch.cat([x[::7], x[:7]]) for x in get_all_triplets_indices(LABELS)))
    elif form == "pairs":
        call = (LABELS, tuple(torch.cat([x[::3], x[:4]]) for x in get_all_pairs_indices(LABELS)))
    elif form == "references":
        call = (LABELS, None, embeddings(9, seed=5), LABELS[3:12])
    ours, theirs = (answer(m.DynamicSoftMarginLoss(**options), embeddings(), *call) for m in (losses, pml_losses))
    assert_same(ours, theirs)


@pytest.mark.parametrize("bounds", [None, Bounds(tile=400, rows=20)])
def test_classes_of_few_rows_are_the_same_in_tiles(bounds: Bounds | None) -> None:
    """Where positives are few, tiles are not masked: what is not a negative is listed."""
    rows, labels = embeddings(80), torch.arange(80) // 2
    with engine.using("tiled", bounds):
        ours = answer(DynamicSoftMarginLoss(num_bins=25, min_val=-3.0), rows, labels)
    assert_same(ours, answer(pml_losses.DynamicSoftMarginLoss(num_bins=25, min_val=-3.0), rows, labels))


@pytest.mark.parametrize("rows", [(7, 7), (5, 8), (8, 5), (1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_views_without_labels_equal_those_of_pml(options: dict[str, Any], rows: tuple[int, int]) -> None:
    """In value: PML's cannot be differentiated, for it writes to the distances."""
    ours, theirs = losses.DynamicSoftMarginLoss(**options), pml_losses.DynamicSoftMarginLoss(**options)
    call = {"embeddings": embeddings(rows[0]), "ref_emb": embeddings(rows[1], seed=2)}
    assert_same((ours(**call), ours.hist_), (theirs(**call), theirs.hist_))


@pytest.mark.parametrize("rows", [(7, 7), (5, 8), (8, 5), (1, 3), (3, 1), (2, 2)])
def test_views_without_labels_equal_their_definition(rows: tuple[int, int]) -> None:
    call = embeddings(rows[0]), None, None, embeddings(rows[1], seed=2)
    ours, theirs = DynamicSoftMarginLoss(), InALoop()
    for _ in range(2):
        assert_same(answer(ours, *call), answer(theirs, *call))


def test_batch_without_labels_is_compared_with_itself_as_in_pml() -> None:
    ours, theirs = losses.DynamicSoftMarginLoss(), pml_losses.DynamicSoftMarginLoss()
    torch.testing.assert_close(ours(embeddings()), theirs(embeddings()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", [(9, 4), (4, 9), (6, 6)])
def test_views_are_compared_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch, rows: tuple[int, int]) -> None:
    call = embeddings(rows[0]), None, None, embeddings(rows[1], seed=2)
    wanted = answer(DynamicSoftMarginLoss(), *call)
    monkeypatch.setattr(soft_margin, "_AT_ONCE", 10)
    assert_same(answer(DynamicSoftMarginLoss(), *call), wanted)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.5, "num_bins": 30}, {"min_val": -0.3}, {"min_val": -1.5, "num_bins": 1}], ids=str
)
def test_later_calls_go_on_from_the_histogram(options: dict[str, Any]) -> None:
    """PML raises at the second backward pass; and, where differences lie beyond the nodes, at once."""
    ours, theirs = DynamicSoftMarginLoss(**options), InALoop(**options)
    for seed in range(3):
        assert_same(answer(ours, embeddings(seed=seed), LABELS), answer(theirs, embeddings(seed=seed), LABELS))


def test_differences_at_an_edge_are_in_the_same_bin_in_tiles() -> None:
    """On a grid of angles many differences are 0 but for what is rounded, and 0 is an edge."""
    angles = torch.arange(0, 360, 20, dtype=torch.float64).deg2rad()
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.arange(18) % 6
    for dtype in (torch.float32, torch.float64):
        with engine.using("tiled"):
            ours = answer(DynamicSoftMarginLoss(), rows.to(dtype), labels)
        with engine.using("dense"):
            wanted = answer(DynamicSoftMarginLoss(), rows.to(dtype), labels)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_histogram_enters_when_the_call_is_committed() -> None:
    loss = DynamicSoftMarginLoss()
    loss(embeddings(), LABELS)
    before = loss.hist_.clone()
    staged = loss.stage(embeddings(seed=3), LABELS)
    assert torch.equal(loss.hist_, before)
    again = loss.stage(embeddings(seed=3), LABELS)
    assert torch.equal(staged.loss, again.loss)
    staged.commit()
    assert not torch.equal(loss.hist_, before)
    assert float(loss.hist_.sum()) == pytest.approx(1)


def test_call_that_fails_leaves_the_histogram_as_it_was() -> None:
    loss = DynamicSoftMarginLoss()
    loss(embeddings(), LABELS)
    before = loss.hist_.clone()
    bad = embeddings(seed=3)
    bad[2, 1] = torch.nan
    with pytest.raises(errors.NonFiniteError, match="embeddings: row 2"):
        loss(bad, LABELS)
    with pytest.raises(errors.NonFiniteError, match="ref_emb: row 2"):
        loss(embeddings(), ref_emb=bad)
    with pytest.raises(ValueError, match="must stay within"):
        loss(embeddings(), LABELS, tuple(torch.tensor([i]) for i in (0, 2, 15)))
    assert torch.equal(loss.hist_, before)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("labels", [torch.arange(15), torch.zeros(15).long()], ids=["distinct", "one class"])
def test_without_triplets_the_loss_is_zero_and_nothing_enters(labels: Tensor) -> None:
    value, histogram, gradient = answer(DynamicSoftMarginLoss(), embeddings(), labels)
    assert value == 0
    assert not histogram.any()
    assert not gradient.any()


@pytest.mark.parametrize("rows", [0, 1])
def test_batch_with_nothing_to_compare_costs_nothing(rows: int) -> None:
    for labels in (LABELS[:rows], None):
        value, histogram, gradient = answer(DynamicSoftMarginLoss(), embeddings()[:rows], labels)
        assert value == 0
        assert not histogram.any()
        assert not gradient.any()


def test_histogram_is_saved_and_moved_with_the_loss() -> None:
    loss = DynamicSoftMarginLoss()
    loss(embeddings(), LABELS)
    loaded = DynamicSoftMarginLoss()
    loaded.load_state_dict(loss.state_dict())
    copied = copy.deepcopy(loss)
    wanted = loss(embeddings(seed=2), LABELS)
    assert torch.equal(loaded(embeddings(seed=2), LABELS), wanted)
    assert torch.equal(copied(embeddings(seed=2), LABELS), wanted)
    assert loss.to("meta").hist_.device.type == "meta"


def test_it_is_reduced_already() -> None:
    wanted = DynamicSoftMarginLoss()(embeddings(), LABELS)
    summed = DynamicSoftMarginLoss(reducer=reducers.SumReducer())
    assert torch.equal(summed(embeddings(), LABELS), wanted)
    parts: Any = DynamicSoftMarginLoss(reducer=reducers.DoNothingReducer())(embeddings(), LABELS)
    assert torch.equal(parts["loss"]["losses"], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lower_precision_is_as_good_as_its_digits(dtype: torch.dtype) -> None:
    rows = embeddings(dtype=dtype)
    wanted = answer(DynamicSoftMarginLoss(), rows.double(), LABELS)
    found = answer(DynamicSoftMarginLoss(), rows, LABELS)
    assert found[-1].dtype == dtype
    assert found[0].dtype == torch.float32
    digits = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found, wanted, rtol=digits, atol=digits / 10, check_dtype=False)


def test_it_cannot_be_the_loss_of_a_queue() -> None:
    with pytest.raises(ValueError, match="CrossBatchMemory"):
        losses.CrossBatchMemory(DynamicSoftMarginLoss(), 4)(embeddings(), LABELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bins": 0}, "num_bins must be a whole number from 1 to"),
        ({"min_val": 0}, "min_val must be 1e-06 to 1,000,000 away from 0, got 0"),
        ({"min_val": float("nan")}, "min_val must be .* got nan"),
        ({"distance": distances.LpDistance(p=1)}, "needs distance=LpDistance"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DynamicSoftMarginLoss(**options)


def test_a_state_of_pml_has_no_histogram_and_is_loaded_all_the_same() -> None:
    loss = losses.DynamicSoftMarginLoss()
    loss(torch.randn(8, 4), torch.arange(8) % 2)
    held = loss.hist_.clone()
    assert bool(held.any())
    loss.load_state_dict(pml_losses.DynamicSoftMarginLoss().state_dict())
    assert torch.equal(loss.hist_, held)
    loss.load_state_dict(losses.DynamicSoftMarginLoss().state_dict())
    assert not bool(loss.hist_.any())
