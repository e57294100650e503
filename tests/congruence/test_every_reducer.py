"""Every reducer of every loss of pairs and triplets, in every use: what its formula makes of the losses one by one.

The losses one by one are what `DoNothingReducer` returns; they are held to PML's, and each reducer to plain arithmetic
on them, in value and gradient, by every engine. Where PML can compute it, the reducer is held to PML's too.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.reducers as pml_reducers
import torch
from torch import Tensor

from gradbank import engine, losses, miners, reducers
from gradbank.engine import Bounds

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")  # in PML

B, M, D, C = 14, 19, 6, 4
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AngularLoss": {},
    "CircleLoss": {"m": 0.3, "gamma": 20},
    "ContrastiveLoss": {"pos_margin": 0.2, "neg_margin": 1.3},
    "DynamicSoftMarginLoss": {},
    "FastAPLoss": {},
    "GeneralizedLiftedStructureLoss": {"neg_margin": 0.8, "pos_margin": 0.1},
    "HistogramLoss": {"n_bins": 20},
    "InstanceLoss": {"gamma": 16},
    "IntraPairVarianceLoss": {"pos_eps": 0.1, "neg_eps": 0.2},
    "LiftedStructureLoss": {},
    "MarginLoss": {"learn_beta": True, "num_classes": C, "nu": 0.1},
    "MultiSimilarityLoss": {},
    "NCALoss": {},
    "NPairsLoss": {},
    "NTXentLoss": {"temperature": 0.3},
    "PNPLoss": {"anneal": 0.1},
    "RankedListLoss": {"margin": 0.4, "Tn": 2},
    "SignalToNoiseRatioContrastiveLoss": {},
    "SmoothAPLoss": {"temperature": 0.1},
    "SupConLoss": {},
    "ThresholdConsistentMarginLoss": {},
    "TripletMarginLoss": {"margin": 0.3},
    "TupletMarginLoss": {},
}
ENGINES: dict[str, tuple[str, Bounds | None]] = {"dense": ("dense", None), "tiled": ("tiled", Bounds(tile=50, rows=4))}
FORMS = ("batch", "references", "queue", "pairs", "triplets")
USES = [
    (name, form)
    for name in ARGUMENTS
    for form in FORMS
    if (form not in ("references", "queue") or getattr(losses, name).takes_references)
    and (form not in ("pairs", "triplets") or getattr(losses, name).use_of_indices != "refused")
    and (name, form) != ("DynamicSoftMarginLoss", "queue")
]
REDUCED_ALREADY = ("DynamicSoftMarginLoss", "HistogramLoss", "PNPLoss", "ThresholdConsistentMarginLoss")
BY_CLASS = torch.linspace(0.5, 2, C, dtype=torch.float64)


class Loss(NamedTuple):
    """The losses of a part, one by one: whose each is, and of what class that anchor is."""

    losses: Tensor
    anchor: Tensor
    classes: Tensor
    is_element: bool


def mean(loss: Loss) -> Tensor:
    return loss.losses.sum() / max(len(loss.losses), 1)


def within(low: float, high: float) -> Callable[[Loss], Tensor]:
    def reduced(loss: Loss) -> Tensor:
        kept = loss.losses[(loss.losses > low) & (loss.losses < high)]
        return kept.sum() / max(len(kept), 1)

    return reduced


def by_class(loss: Loss) -> Tensor:
    return (loss.losses * BY_CLASS[loss.classes[loss.anchor]]).sum() / max(len(loss.losses), 1)


def by_anchor(then: Callable[[Loss], Tensor], of_anchor: Callable[[Tensor], Tensor]) -> Callable[[Loss], Tensor]:
    """Elements are left as they are; of pairs and triplets, an anchor without any has 0."""

    def reduced(loss: Loss) -> Tensor:
        if loss.is_element:
            return then(loss)
        made = []
        for a in range(len(loss.classes)):
            own = loss.losses[loss.anchor == a]
            made.append(of_anchor(own) if len(own) else loss.losses.sum() * 0)
        return then(Loss(torch.stack(made), torch.arange(len(made)), loss.classes, True))

    return reduced


def softly(table: Tensor, number: Tensor) -> Tensor:
    """The mean of the squares of what each anchor has."""
    return table.square().sum(1) / number.clamp(min=1)


# what each reducer is built as, and what it makes of the losses of a part of that name
Formula = Callable[[str, Loss], Tensor]
REDUCERS: dict[str, tuple[Callable[[Any], Any], Formula]] = {
    "mean": (lambda m: m.MeanReducer(), lambda part, loss: mean(loss)),
    "sum": (lambda m: m.SumReducer(), lambda part, loss: loss.losses.sum()),
    "nonzero": (lambda m: m.AvgNonZeroReducer(), lambda part, loss: within(0, torch.inf)(loss)),
    "above": (lambda m: m.ThresholdReducer(low=0.2), lambda part, loss: within(0.2, torch.inf)(loss)),
    "below": (lambda m: m.ThresholdReducer(high=0.7), lambda part, loss: within(-torch.inf, 0.7)(loss)),
    "by class": (lambda m: m.ClassWeightedReducer(BY_CLASS), lambda part, loss: by_class(loss)),
    "by anchor": (lambda m: m.PerAnchorReducer(), lambda part, loss: by_anchor(mean, torch.mean)(loss)),
    "sum by anchor": (
        lambda m: m.PerAnchorReducer(m.SumReducer()),
        lambda part, loss: by_anchor(lambda each: each.losses.sum(), torch.mean)(loss),
    ),
    "above, by anchor": (
        lambda m: m.PerAnchorReducer(m.ThresholdReducer(low=0.2)),
        lambda part, loss: by_anchor(within(0.2, torch.inf), torch.mean)(loss),
    ),
    "by class, by anchor": (
        lambda m: m.PerAnchorReducer(m.ClassWeightedReducer(BY_CLASS)),
        lambda part, loss: by_anchor(by_class, torch.mean)(loss),
    ),
    "squares by anchor": (
        lambda m: m.PerAnchorReducer(aggregation_func=softly),
        lambda part, loss: by_anchor(mean, lambda own: own.square().mean())(loss),
    ),
    "by part": (
        lambda m: m.MultipleReducers(
            {"pos_loss": m.SumReducer(), "neg_loss": m.ThresholdReducer(low=0.2), "margin_loss": m.SumReducer()},
            m.AvgNonZeroReducer(),
        ),
        lambda part, loss: {
            "pos_loss": lambda loss: loss.losses.sum(),
            "neg_loss": within(0.2, torch.inf),
            "margin_loss": lambda loss: loss.losses.sum(),
        }.get(part, within(0, torch.inf))(loss),
    ),
    "by part, mean by default": (
        lambda m: m.MultipleReducers({"neg_loss": m.SumReducer()}),
        lambda part, loss: loss.losses.sum() if part == "neg_loss" else mean(loss),
    ),
}


def batch(seed: int, size: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, D, dtype=torch.float64, generator=generator), torch.arange(size) * 7 % C


def call(library: Any, name: str, form: str, reducer: Any, leaf: Tensor) -> Any:
    """What the loss with that reducer says of a batch."""
    made = getattr(library, name)(**ARGUMENTS[name], reducer=reducer).double()
    _, labels = batch(0)
    if form == "references":
        return made(leaf, labels, None, *batch(1, M))
    if form == "queue":
        bank = library.CrossBatchMemory(made, D, M).double()
        bank.add_to_memory(*batch(1, M - 3), M - 3)
        return bank(leaf, labels)
    if form == "batch":
        return made(leaf, labels)
    miner = miners.MultiSimilarityMiner(0.4) if form == "pairs" else miners.TripletMarginMiner(0.1)
    return made(leaf, labels, miner(leaf.detach(), labels))


def differentiated(value: Tensor, leaf: Tensor) -> list[Tensor]:
    return [value.detach(), torch.autograd.grad(value, leaf)[0]]


def by_every_engine(name: str, form: str, reducer: Callable[[], Any]) -> Iterator[tuple[str, list[Tensor]]]:
    for each, (kind, bounds) in ENGINES.items():
        leaf = batch(0)[0].requires_grad_()
        with engine.using(kind, bounds):
            yield each, differentiated(call(losses, name, form, reducer(), leaf), leaf)


def assert_equal(found: list[Tensor], wanted: list[Tensor], what: str, rtol: float = 1e-9) -> None:
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol / 10, msg=lambda m: f"{what}: {m}")


def one_by_one(part: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The losses of a part, each after its indices, in order."""
    values = part["losses"].detach().flatten().tolist()
    if part["reduction_type"] == "already_reduced":
        return [(value,) for value in values]
    indices = part["indices"] if isinstance(part["indices"], tuple | list) else (part["indices"],)
    return sorted(zip(*(index.flatten().tolist() for index in indices), values, strict=True))


def pml_is_right(name: str, form: str) -> bool:
    if form in ("references", "queue") and name in ("LiftedStructureLoss", "ThresholdConsistentMarginLoss"):
        return False  # it takes a reference's position for an anchor's
    if (name, form) == ("LiftedStructureLoss", "triplets") or name == "SmoothAPLoss":
        return False  # it counts repeated negatives once; it wants sorted labels
    return form != "queue" or name in pml_losses.CrossBatchMemory.supported_losses()


def names_its_parts(name: str) -> bool:
    return name != "ThresholdConsistentMarginLoss"  # of two parts, which PML adds up


@pytest.mark.parametrize(("name", "form"), [use for use in USES if pml_is_right(*use) and names_its_parts(use[0])])
def test_the_losses_one_by_one_are_those_of_pml(name: str, form: str) -> None:
    leaves = [batch(0)[0].requires_grad_() for _ in range(2)]
    mine = call(losses, name, form, reducers.DoNothingReducer(), leaves[0])
    theirs = call(pml_losses, name, form, pml_reducers.DoNothingReducer(), leaves[1])
    assert mine.keys() == theirs.keys()
    rtol = 1e-5 if name in ("DynamicSoftMarginLoss", "HistogramLoss") else 1e-8  # PML bins in float32
    for part, wanted in theirs.items():
        assert mine[part]["reduction_type"] == wanted["reduction_type"]
        found, listed = one_by_one(mine[part]), one_by_one(wanted)
        assert [each[:-1] for each in found] == [each[:-1] for each in listed]
        assert [each[-1] for each in found] == pytest.approx([each[-1] for each in listed], rel=rtol, abs=rtol / 10)
        if "divisor" in wanted:
            assert float(mine[part]["divisor"]) == float(wanted["divisor"])
    gradients = [
        torch.autograd.grad(sum(part["losses"].square().sum() for part in parts.values()), leaf)[0]
        for parts, leaf in zip((mine, theirs), leaves)
    ]
    torch.testing.assert_close(*gradients, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize(("name", "form"), [use for use in USES if use[0] not in REDUCED_ALREADY])
def test_a_reducer_makes_its_formula_of_them(name: str, form: str) -> None:
    leaf, (_, labels) = batch(0)[0].requires_grad_(), batch(0)
    parts = call(losses, name, form, reducers.DoNothingReducer(), leaf)
    for each, (make, formula) in REDUCERS.items():
        made = []
        for part, listed in parts.items():
            kind, indices = listed["reduction_type"], listed["indices"]
            anchor = indices if kind == "element" else indices[0]
            made.append(formula(part, Loss(listed["losses"], anchor, labels, kind == "element")))
        value = torch.stack(made).sum()
        gradient = torch.autograd.grad(value, leaf, retain_graph=True)[0]
        wanted = [value.detach(), gradient]
        for by, found in by_every_engine(name, form, lambda make=make: make(reducers)):
            assert_equal(found, wanted, f"{each}, {by}")


@pytest.mark.parametrize(("name", "form"), [use for use in USES if use[0] in REDUCED_ALREADY])
def test_a_loss_that_is_a_number_already_asks_no_reducer(name: str, form: str) -> None:
    leaf = batch(0)[0].requires_grad_()
    parts = call(losses, name, form, reducers.DoNothingReducer(), leaf)
    wanted = differentiated(torch.stack([part["losses"] for part in parts.values()]).sum(), leaf)
    for each in (*(make for make, _ in REDUCERS.values()), lambda m: m.DivisorReducer()):
        for by, found in by_every_engine(name, form, lambda each=each: each(reducers)):
            assert_equal(found, wanted, f"{each(reducers)}, {by}")


@pytest.mark.parametrize("form", ["batch", "pairs", "triplets"])
def test_the_parts_of_a_consistent_margin_add_up_to_that_of_pml(form: str) -> None:
    leaf = batch(0)[0].requires_grad_()
    mine, theirs = (
        call(library, "ThresholdConsistentMarginLoss", form, of.DoNothingReducer(), leaf)
        for library, of in ((losses, reducers), (pml_losses, pml_reducers))
    )
    assert (list(mine), list(theirs)) == (["pos_loss", "neg_loss"], ["loss"])
    found = mine["pos_loss"]["losses"] + mine["neg_loss"]["losses"]
    assert_equal(differentiated(found, leaf), differentiated(theirs["loss"]["losses"], leaf), form)


# PML's fills a matrix of the batch: that takes no references, no triplets, no pair twice, and no losses in a column
NOT_BY_ANCHOR_IN_PML = ("AngularLoss", "LiftedStructureLoss", "MarginLoss", "TripletMarginLoss", "TupletMarginLoss")
PER_ANCHOR_IN_PML = [
    (name, form)
    for name, form in USES
    if form in ("batch", "pairs") and pml_is_right(name, form) and name not in NOT_BY_ANCHOR_IN_PML
]


@pytest.mark.parametrize(("name", "form"), PER_ANCHOR_IN_PML)
@pytest.mark.parametrize("reducer", ["by anchor", "sum by anchor", "above, by anchor", "squares by anchor"])
def test_the_mean_by_anchor_is_that_of_pml(name: str, form: str, reducer: str) -> None:
    make, _ = REDUCERS[reducer]
    leaf = batch(0)[0].requires_grad_()
    wanted = differentiated(call(pml_losses, name, form, make(pml_reducers), leaf), leaf)
    rtol = 1e-5 if name in ("DynamicSoftMarginLoss", "HistogramLoss") else 1e-8
    for by, found in by_every_engine(name, form, lambda: make(reducers)):
        assert_equal(found, wanted, by, rtol)


@pytest.mark.parametrize("name", ["AngularLoss", "LiftedStructureLoss", "TupletMarginLoss"])
def test_pml_cannot_take_the_mean_by_anchor_of_a_column(name: str) -> None:
    with pytest.raises(RuntimeError, match="shape mismatch"):
        call(pml_losses, name, "batch", pml_reducers.PerAnchorReducer(), batch(0)[0])
    assert call(losses, name, "batch", reducers.PerAnchorReducer(), batch(0)[0]) > 0


@pytest.mark.parametrize("kind", ENGINES)
def test_a_pair_that_is_listed_twice_counts_twice_in_the_mean_by_anchor(kind: str) -> None:
    embeddings, _ = batch(0)
    listed = tuple(torch.tensor(each) for each in ([0, 0, 0, 1], [1, 1, 2, 2], [0, 1], [3, 4]))
    one, two, other = (
        float(losses.NTXentLoss()(embeddings, None, tuple(torch.tensor([i]) for i in pair)))
        for pair in ((0, 1, 0, 3), (0, 2, 0, 3), (1, 2, 1, 4))
    )
    with engine.using(*ENGINES[kind]):
        found = losses.NTXentLoss(reducer=reducers.PerAnchorReducer())(embeddings, None, listed)
    assert float(found) == pytest.approx(((2 * one + two) / 3 + other) / B, rel=1e-9)
    theirs = pml_losses.NTXentLoss(reducer=pml_reducers.PerAnchorReducer())(embeddings, None, listed)
    assert float(theirs) == pytest.approx(((one + two) / 2 + other) / B, rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reducer", ["by part", "by part, mean by default"])
@pytest.mark.parametrize(
    "name", ["ContrastiveLoss", "IntraPairVarianceLoss", "SignalToNoiseRatioContrastiveLoss", "MarginLoss"]
)
def test_a_reducer_of_each_part_is_that_of_pml(name: str, reducer: str, form: str) -> None:
    make, _ = REDUCERS[reducer]
    leaf = batch(0)[0].requires_grad_()
    wanted = differentiated(call(pml_losses, name, form, make(pml_reducers), leaf), leaf)
    for by, found in by_every_engine(name, form, lambda: make(reducers)):
        assert_equal(found, wanted, by)


@pytest.mark.parametrize("form", FORMS)
def test_the_divisor_is_the_number_of_terms_above_zero(form: str) -> None:
    leaf = batch(0)[0].requires_grad_()
    wanted = differentiated(call(pml_losses, "MarginLoss", form, pml_reducers.DivisorReducer(), leaf), leaf)
    for by, found in by_every_engine("MarginLoss", form, reducers.DivisorReducer):
        assert_equal(found, wanted, by)


@pytest.mark.parametrize(
    ("name", "form"), [use for use in USES if use[0] not in REDUCED_ALREADY and use[0] != "MarginLoss"]
)
def test_a_loss_without_a_divisor_says_so(name: str, form: str) -> None:
    for kind, bounds in ENGINES.values():
        with (
            engine.using(kind, bounds),
            pytest.raises(ValueError, match="DivisorReducer needs a loss that gives a div"),
        ):
            call(losses, name, form, reducers.DivisorReducer(), batch(0)[0].requires_grad_())
