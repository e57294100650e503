"""Every loss of pairs and triplets: PML, the whole matrix, and tiles of it, in value and in every gradient.

Where PML is wrong, `test_differences` has the paper's value; here the engines are held to each other.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.miners as pml_miners
import pytorch_metric_learning.reducers as pml_reducers
import torch
from torch import Tensor

import gradbank
from gradbank import distances, engine, losses, miners, reducers
from gradbank.engine import Bounds

B, M, D, C = 22, 37, 8, 5

COSINE_ONLY = (
    "CircleLoss",
    "InstanceLoss",
    "PNPLoss",
    "SmoothAPLoss",
    "ThresholdConsistentMarginLoss",
    "TupletMarginLoss",
)
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "AngularLoss": [{}, {"alpha": 30}],
    "CircleLoss": [{"m": 0.3, "gamma": 20}],
    "ContrastiveLoss": [{}, {"pos_margin": 0.2, "neg_margin": 1.3}],
    "DynamicSoftMarginLoss": [{}],
    "FastAPLoss": [{}, {"num_bins": 5}],
    "GeneralizedLiftedStructureLoss": [{}, {"neg_margin": 0.8, "pos_margin": 0.1}],
    "HistogramLoss": [{}, {"n_bins": 20}],
    "InstanceLoss": [{"gamma": 16}],
    "IntraPairVarianceLoss": [{}, {"pos_eps": 0.1, "neg_eps": 0.2}],
    "LiftedStructureLoss": [{}, {"neg_margin": 0.8, "pos_margin": 0.1}],
    "MarginLoss": [{}, {"learn_beta": True, "nu": 0.1}, {"learn_beta": True, "num_classes": C, "nu": 0.1}],
    "MultiSimilarityLoss": [{}, {"alpha": 3, "beta": 20, "base": 0.3}],
    "NCALoss": [{}, {"softmax_scale": 3}],
    "NPairsLoss": [{}],
    "NTXentLoss": [{}, {"temperature": 0.3}],
    "PNPLoss": [{"variant": each, "anneal": 0.1} for each in ("Ds", "Dq", "Iu", "Ib", "O")],
    "RankedListLoss": [{"margin": 0.4, "Tn": 2, "Tp": 1}],
    "SignalToNoiseRatioContrastiveLoss": [{}],
    "SupConLoss": [{}, {"temperature": 0.3}],
    "ThresholdConsistentMarginLoss": [{}, {"margin_plus": 0.5, "margin_minus": 0.1}],
    "TripletMarginLoss": [
        {},
        {"margin": 0.3},
        {"smooth_loss": True},
        {"swap": True},
        {"swap": True, "smooth_loss": True},
    ],
    "TupletMarginLoss": [{}, {"margin": 10, "scale": 8}],
}
EVERY = [(name, arguments) for name, several in ARGUMENTS.items() for arguments in several]
IN_BANK = [
    (name, arguments)
    for name, arguments in EVERY
    if getattr(losses, name).takes_references
    and not arguments.get("swap")
    and name not in ("DynamicSoftMarginLoss", "ThresholdConsistentMarginLoss")
]
REDUCERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("MeanReducer", {}),
    "sum": ("SumReducer", {}),
    "above": ("ThresholdReducer", {"low": 0.2}),
    "between": ("ThresholdReducer", {"low": 0.05, "high": 1.2}),
    "nonzero": ("AvgNonZeroReducer", {}),
    "by class": ("ClassWeightedReducer", {"weights": torch.linspace(0.5, 2, C, dtype=torch.float64)}),
}
# PML gives these losses in a column, (B, 1), which times a row of weights is (B, B)
IN_COLUMNS = (
    "AngularLoss",
    "CircleLoss",
    "GeneralizedLiftedStructureLoss",
    "LiftedStructureLoss",
    "MultiSimilarityLoss",
    "TupletMarginLoss",
)
ENGINES: dict[str, tuple[str, Bounds | None]] = {
    "dense": ("dense", None),
    "tiled": ("tiled", None),
    "small tiles": ("tiled", Bounds(tile=64, rows=6)),
    "block by block": ("tiled", Bounds(tile=64, rows=6, positives=9)),
}

Made = list[Tensor]


def named(value: Any) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) or "defaults" if isinstance(value, dict) else str(value)


def batch(seed: int, size: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, D, dtype=torch.float64, generator=generator)
    return rows, torch.randint(C, (size,), generator=generator)


def call(loss: Any, embeddings: Tensor, *rest: Any, ref_emb: Tensor | None = None, **named: Any) -> Made:
    """The loss, and its gradients of embeddings, references and parameters."""
    leaves = [embeddings.clone().requires_grad_()]
    if ref_emb is not None:
        leaves.append(ref_emb.clone().requires_grad_())
        named["ref_emb"] = leaves[1]
    leaves += list(loss.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = loss(leaves[0], *rest, **named)
    if not value.requires_grad:
        return [value, *(torch.zeros_like(leaf) for leaf in leaves)]
    made = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, made))]


def everywhere(make: Callable[[], Any], *rest: Any, **named: Any) -> Iterator[tuple[str, Made]]:
    for name, (kind, bounds) in ENGINES.items():
        with engine.using(kind, bounds):
            try:
                yield name, call(make().double(), *rest, **named)
            except ValueError as error:  # some are written on all anchors at once
                if "too many of them to hold" not in str(error):
                    raise


def assert_equal(found: Made, wanted: Made, what: str, rtol: float = 1e-8) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=rtol, atol=rtol / 10, msg=lambda m: f"{what}: {m}")


def agree(make: Callable[[], Any], theirs: Any, *rest: Any, **named: Any) -> None:
    """Holds every engine to PML, or without that to the first."""
    first = None
    for name, found in everywhere(make, *rest, **named):
        first = found if first is None else first
        assert_equal(found, first, name)
    if theirs is not None and first is not None:
        # PML bins in float32
        rtol = 1e-5 if type(theirs).__name__ in ("HistogramLoss", "DynamicSoftMarginLoss") else 1e-8
        assert_equal(first, call(theirs.double(), *rest, **named), "PML", rtol)


@pytest.mark.parametrize(("name", "arguments"), EVERY, ids=named)
@pytest.mark.parametrize("kind", ["plenty", "one class", "all distinct", "two rows", "one lone"])
def test_labels_of_every_kind(name: str, arguments: dict[str, Any], kind: str) -> None:
    embeddings, labels = batch(0)
    labels = {
        "plenty": labels,
        "one class": torch.zeros_like(labels),
        "all distinct": torch.arange(B) % C if arguments.get("num_classes") else torch.arange(B),
        "two rows": labels[:2] * 0,
        "one lone": torch.cat([torch.zeros(B - 1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)]),
    }[kind]
    # what PML does not compute there: SmoothAP wants equal classes, NCA is NaN, SupCon 0 without negatives
    theirs: Any = getattr(pml_losses, name)(**arguments)
    wrong = {
        "SmoothAPLoss": True,
        "NCALoss": kind == "all distinct",
        "SupConLoss": kind in ("one class", "two rows"),
        "ContrastiveLoss": kind == "two rows",
        "IntraPairVarianceLoss": kind == "two rows",
        "MultiSimilarityLoss": kind == "two rows",
        "GeneralizedLiftedStructureLoss": kind == "two rows",
        "HistogramLoss": kind == "two rows",
    }.get(name, False)
    agree(lambda: getattr(losses, name)(**arguments), None if wrong else theirs, embeddings[: len(labels)], labels)


@pytest.mark.parametrize(("name", "arguments"), [each for each in EVERY if each in IN_BANK], ids=named)
@pytest.mark.parametrize("shared", ["labels of their own", "the same labels"])
def test_references_get_their_gradient(name: str, arguments: dict[str, Any], shared: str) -> None:
    embeddings, labels = batch(1)
    ref_emb, ref_labels = batch(2, M)
    more: dict[str, Any] = {"ref_emb": ref_emb, "ref_labels": ref_labels}
    if shared == "the same labels":
        more = {"ref_emb": batch(2)[0], "ref_labels": labels}
    # in PML, the position of a lifted reference is taken for an anchor's
    theirs = None if name == "LiftedStructureLoss" else getattr(pml_losses, name)(**arguments)
    agree(lambda: getattr(losses, name)(**arguments), theirs, embeddings, labels, **more)


@pytest.mark.parametrize(("name", "arguments"), IN_BANK, ids=named)
@pytest.mark.parametrize("mined", ["everything", "pairs", "triplets"])
def test_a_queue_that_wraps_around(name: str, arguments: dict[str, Any], mined: str) -> None:
    """Three batches into a queue that two of them fill; the third is compared."""

    def miner(library: Any) -> Any:
        if mined == "everything":
            return None
        return library.MultiSimilarityMiner(0.3) if mined == "pairs" else library.TripletMarginMiner(0.3)

    def bank(library: Any, from_miners: Any) -> Any:
        made = library.CrossBatchMemory(getattr(library, name)(**arguments), D, 50, miner=miner(from_miners)).double()
        for seed in (3, 4):
            with torch.no_grad():
                made(*batch(seed))
        return made

    in_pml = name in pml_losses.CrossBatchMemory.supported_losses() and name != "LiftedStructureLoss"
    agree(lambda: bank(losses, miners), bank(pml_losses, pml_miners) if in_pml else None, *batch(5))


@pytest.mark.parametrize(("name", "arguments"), EVERY, ids=named)
@pytest.mark.parametrize("form", ["pairs", "triplets"])
def test_what_a_miner_lists(name: str, arguments: dict[str, Any], form: str) -> None:
    if getattr(losses, name).use_of_indices == "refused":
        pytest.skip("takes no indices")
    embeddings, labels = batch(6)
    miner = miners.MultiSimilarityMiner(0.4) if form == "pairs" else miners.TripletMarginMiner(0.1)
    listed = miner(embeddings, labels)
    without = name == "LiftedStructureLoss" and form == "triplets"  # PML counts the union of repeated negatives
    theirs = None if without else getattr(pml_losses, name)(**arguments)
    agree(lambda: getattr(losses, name)(**arguments), theirs, embeddings, labels, listed)


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_reducers(name: str, reducer: str) -> None:
    kind, options = REDUCERS[reducer]
    embeddings, labels = batch(7)

    def make(library: Any, from_reducers: Any) -> Any:
        made = getattr(from_reducers, kind)(**copy.deepcopy(options))
        return getattr(library, name)(**ARGUMENTS[name][-1], reducer=made)

    without = reducer == "by class" and name in IN_COLUMNS
    theirs = None if without else make(pml_losses, pml_reducers)
    agree(lambda: make(losses, reducers), theirs, embeddings, labels)


@pytest.mark.parametrize("distance", ["LpDistance", "L1", "squared", "CosineSimilarity", "raw dot", "SNRDistance"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_distances(name: str, distance: str) -> None:
    kind, options = {
        "L1": ("LpDistance", {"p": 1}),
        "squared": ("LpDistance", {"power": 2}),
        "raw dot": ("DotProductSimilarity", {"normalize_embeddings": False}),
    }.get(distance, (distance, {}))
    embeddings, labels = batch(8)

    def make(library: Any, from_distances: Any) -> Any:
        return getattr(library, name)(**ARGUMENTS[name][0], distance=getattr(from_distances, kind)(**options))

    try:
        theirs = make(pml_losses, pml_distances)
    except AssertionError:
        with pytest.raises(ValueError, match="distance"):
            make(losses, distances)
        return
    if (name, distance) == ("DynamicSoftMarginLoss", "squared") or (
        name == "HistogramLoss" and distance != "CosineSimilarity"
    ):
        theirs = None  # what lies beyond PML's histogram is indexed all the same
    agree(lambda: make(losses, distances), theirs, embeddings, labels)


@pytest.mark.parametrize(("name", "arguments"), EVERY, ids=named)
def test_permuting_the_batch_permutes_the_gradient(name: str, arguments: dict[str, Any]) -> None:
    if name in ("NPairsLoss", "InstanceLoss"):
        pytest.skip("goes by the order of rows, as PML's does")
    embeddings, labels = batch(9)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    first = call(getattr(losses, name)(**arguments).double(), embeddings, labels)
    second = call(getattr(losses, name)(**arguments).double(), embeddings[order], labels[order])
    assert_equal([second[0], second[1]], [first[0], first[1][order]], "permuted")


@pytest.mark.parametrize(("name", "arguments"), EVERY, ids=named)
def test_float32_errs_at_most_twice_as_much_as_pml(name: str, arguments: dict[str, Any]) -> None:
    embeddings, labels = batch(10)
    truth = call(getattr(losses, name)(**arguments).double(), embeddings, labels)
    theirs = call(getattr(pml_losses, name)(**arguments).to(embeddings.device), embeddings.float(), labels)
    for kind, bounds in (ENGINES["dense"], ENGINES["small tiles"]):
        with engine.using(kind, bounds):
            found = call(getattr(losses, name)(**arguments), embeddings.float(), labels)
        for mine, other, true in zip(found, theirs, truth, strict=True):
            scale = true.abs().max().clamp(min=1e-3)
            least = 1e-6 * float(scale)
            assert float((mine - true).abs().max()) <= max(2 * float((other - true).abs().max()), 10 * least)


@pytest.mark.parametrize(("loss_name", "arguments"), EVERY, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_remote_equals_local(
    embedded: gradbank.Client, loss_name: str, arguments: dict[str, Any], dtype: torch.dtype, name: str
) -> None:
    here = getattr(losses, loss_name)(**arguments)
    there = embedded.open(name, here.rebuilt())
    embeddings, labels = batch(11)
    values = []
    for loss in (here, there):
        leaf = embeddings.to(dtype).requires_grad_()
        value = loss(leaf, labels)
        value.backward()
        values.append((value.detach(), leaf.grad))
    embedded.close_session(name)
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
