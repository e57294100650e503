"""Every loss of embeddings in half precision: computed in float32, whether autocast is on or not."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gradbank import distances, engine, losses, miners, regularizers
from gradbank.engine import Bounds
from gradbank.evaluation import AccuracyCalculator

B, M, D, C = 18, 26, 8, 5
HERE = torch.empty(0).device  # as --device has it
DTYPES = [torch.bfloat16, torch.float16]
SCALE = 1024.0  # as a GradScaler has one, so that small gradients survive in half precision
PAIR_LOSSES: dict[str, dict[str, Any]] = {
    "AngularLoss": {},
    "CircleLoss": {},
    "ContrastiveLoss": {},
    "DynamicSoftMarginLoss": {},
    "FastAPLoss": {},
    "GeneralizedLiftedStructureLoss": {},
    "HistogramLoss": {},
    "InstanceLoss": {},
    "IntraPairVarianceLoss": {},
    "LiftedStructureLoss": {},
    "MarginLoss": {"learn_beta": True, "num_classes": C, "nu": 0.1},
    "MultiSimilarityLoss": {},
    "NCALoss": {},
    "NPairsLoss": {},
    "NTXentLoss": {},
    "PNPLoss": {},
    "RankedListLoss": {"margin": 0.4, "Tn": 2},
    "SignalToNoiseRatioContrastiveLoss": {},
    "SmoothAPLoss": {},
    "SupConLoss": {},
    "ThresholdConsistentMarginLoss": {},
    "TripletMarginLoss": {},
    "TupletMarginLoss": {},
}
CLASSIFIERS = (
    "ArcFaceLoss",
    "CosFaceLoss",
    "LargeMarginSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "SoftTripleLoss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
)
WITH_REFERENCES = [name for name in PAIR_LOSSES if getattr(losses, name).takes_references]
IN_QUEUES = [name for name in WITH_REFERENCES if name != "DynamicSoftMarginLoss"]

Make = Callable[[], Any]
Call = tuple[Any, ...]


def rows(seed: int, size: int = B) -> Tensor:
    return torch.randn(size, D, generator=torch.Generator().manual_seed(seed))


def labels(seed: int, size: int = B) -> Tensor:
    return torch.randint(C, (size,), generator=torch.Generator().manual_seed(seed))


def pair_loss(name: str, **more: Any) -> Make:
    return lambda: getattr(losses, name)(**PAIR_LOSSES[name], **more)


def queue(name: str, miner: Callable[[], miners.Miner] | None = None) -> Make:
    def make() -> Any:
        made = losses.CrossBatchMemory(pair_loss(name)(), D, 40, None if miner is None else miner())
        made.add_to_memory(rows(1, 30), labels(1, 30))
        return made

    return make


# what makes a loss, and what it takes besides the embeddings
EVERY: dict[str, tuple[Make, Call]] = {name: (pair_loss(name), (labels(0),)) for name in PAIR_LOSSES}
EVERY |= {
    f"{name} of the nearest": (pair_loss("TripletMarginLoss", swap=True, **more), (labels(0),))
    for name, more in (("swapped", {}), ("smooth", {"smooth_loss": True}))
}
EVERY |= {
    name: (lambda name=name: getattr(losses, name)(num_classes=C, embedding_size=D), (labels(0),))
    for name in CLASSIFIERS
}
EVERY |= {
    "P2SGradLoss": (lambda: losses.P2SGradLoss(D, C), (labels(0),)),
    "ManifoldLoss": (lambda: losses.ManifoldLoss(D, K=C), (None, labels(0))),
    "NPairLoss": (losses.NPairLoss, (labels(0),)),
    "VICRegLoss": (losses.VICRegLoss, (None, None, rows(3))),
    "SelfSupervisedLoss": (lambda: losses.SelfSupervisedLoss(losses.NTXentLoss()), (rows(3),)),
    "SelfSupervisedLoss, one way": (lambda: losses.SelfSupervisedLoss(losses.SupConLoss(), False), (rows(3),)),
    "SelfSupervisedLossWrapper": (lambda: losses.SelfSupervisedLossWrapper(losses.NTXentLoss()), (labels(0),)),
    "MultipleLosses": (
        lambda: losses.MultipleLosses([losses.NTXentLoss(), losses.ContrastiveLoss()], weights=[0.3, 0.7]),
        (labels(0),),
    ),
}
EVERY |= {
    f"{name}, regularized": (
        lambda make=make: make(embedding_regularizer=regularizers.LpRegularizer(power=2), embedding_reg_weight=0.3),
        call,
    )
    for name, make, call in (
        ("NTXentLoss", losses.NTXentLoss, (labels(0),)),
        ("NPairLoss", losses.NPairLoss, (labels(0),)),
        ("MultipleLosses", partial(losses.MultipleLosses, [losses.NTXentLoss()]), (labels(0),)),
        ("SelfSupervisedLoss", partial(losses.SelfSupervisedLoss, losses.NTXentLoss()), (rows(3),)),
        ("SelfSupervisedLoss, one way", partial(losses.SelfSupervisedLoss, losses.NTXentLoss(), False), (rows(3),)),
        ("CrossBatchMemory", partial(losses.CrossBatchMemory, losses.NTXentLoss(), D, 40), (labels(0),)),
        ("ArcFaceLoss", partial(losses.ArcFaceLoss, C, D), (labels(0),)),
    )
}
EVERY |= {f"{name} in a queue": (queue(name), (labels(0),)) for name in IN_QUEUES}
EVERY |= {
    f"{name} mined in a queue, {kind}": (queue(name, miner), (labels(0),))
    for name in ("TripletMarginLoss", "MultiSimilarityLoss")
    for kind, miner in (("pairs", miners.MultiSimilarityMiner), ("triplets", miners.TripletMarginMiner))
}
EVERY |= {
    f"{name} with references": (pair_loss(name), (labels(0), None, rows(4, M), labels(4, M)))
    for name in WITH_REFERENCES
}
EVERY |= {
    f"{name}, {kind} listed": (pair_loss(name), (labels(0), miner()(rows(0), labels(0))))
    for name in PAIR_LOSSES
    if getattr(losses, name).use_of_indices != "refused"
    for kind, miner in (("pairs", miners.MultiSimilarityMiner), ("triplets", miners.TripletMarginMiner))
}


def cast(call: Call, dtype: torch.dtype) -> tuple[list[Any], list[Tensor]]:
    """The call with its rows of that dtype, and those rows, which want a gradient."""
    made = [x.detach().to(dtype, copy=True) if isinstance(x, Tensor) and x.is_floating_point() else x for x in call]
    return made, [x.requires_grad_() for x in made if isinstance(x, Tensor) and x.is_floating_point()]


def answer(make: Make, call: Call, dtype: torch.dtype, widened: bool, cast_by: torch.dtype | None = None) -> Any:
    """The value, the gradients of rows of that dtype, or of the same rows in float32, and those of parameters."""
    torch.manual_seed(0)
    loss = make()
    torch.manual_seed(0)
    narrow, _ = cast(call, dtype)
    given, leaves = cast(tuple(narrow), torch.float32) if widened else cast(call, dtype)
    with nullcontext() if cast_by is None else torch.autocast(HERE.type, dtype=cast_by):
        value = loss(*given)
    (value * SCALE).backward()
    learned = list(loss.parameters())
    assert all(each.dtype == torch.float32 for each in learned)
    return value.detach(), [leaf.grad for leaf in leaves], [each.grad for each in learned]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    make, call = EVERY[name]
    call = (rows(0), *call)
    value, gradients, learned = answer(make, call, dtype, widened=True)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert all(each.isfinite().all() and each.any() for each in gradients)
    for cast_by in (None, *DTYPES):
        found, of_rows, of_parameters = answer(make, call, dtype, widened=False, cast_by=cast_by)
        assert found.dtype == torch.float32
        assert torch.equal(found, value)
        for mine, wide in zip(of_rows, gradients, strict=True):
            assert mine.dtype == dtype
            assert torch.equal(mine, wide.to(dtype))
        for mine, wide in zip(of_parameters, learned, strict=True):
            assert mine.dtype == torch.float32
            assert torch.equal(mine, wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_autocast_changes_nothing_of_float32(name: str, dtype: torch.dtype) -> None:
    make, call = EVERY[name]
    call = (rows(0), *call)
    value, gradients, learned = answer(make, call, torch.float32, widened=True)
    found, of_rows, of_parameters = answer(make, call, torch.float32, widened=True, cast_by=dtype)
    assert torch.equal(found, value)
    for mine, other in zip((*of_rows, *of_parameters), (*gradients, *learned), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name not in ("InstanceLoss", "NPairsLoss")])
def test_tiles_of_half_precision_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    call = (rows(0), labels(0))
    with engine.using("tiled", Bounds(tile=40, rows=5)):
        value, (gradient,), _ = answer(pair_loss(name), call, dtype, widened=True)
        found, (mine,), _ = answer(pair_loss(name), call, dtype, widened=False, cast_by=dtype)
    assert torch.equal(found, value)
    assert torch.equal(mine, gradient.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WITH_REFERENCES)
def test_either_side_may_be_the_narrow_one(name: str, dtype: torch.dtype) -> None:
    """As of a model in half precision, compared with what was computed before."""
    for narrow in (0, 1):
        leaves = [rows(0), rows(4, M)]
        leaves[narrow] = leaves[narrow].to(dtype)
        wide = [leaf.float().requires_grad_() for leaf in leaves]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        values = [pair_loss(name)()(each[0], labels(0), None, each[1], labels(4, M)) for each in (leaves, wide)]
        for value in values:
            value.backward()
        assert torch.equal(*values)
        for mine, other in zip(leaves, wide):
            assert mine.grad is not None
            assert other.grad is not None
            assert torch.equal(mine.grad, other.grad.to(mine.dtype))


MINERS: dict[str, Callable[[], miners.Miner]] = {
    "angular": miners.AngularMiner,
    "easy and semihard": miners.BatchEasyHardMiner,
    "hardest": miners.BatchHardMiner,
    "weighted by distance": miners.DistanceWeightedMiner,
    "hardest share": miners.HDCMiner,
    "multi-similarity": miners.MultiSimilarityMiner,
    "margin of pairs": miners.PairMarginMiner,
    "margin of triplets": miners.TripletMarginMiner,
    "margin of cosines": lambda: miners.TripletMarginMiner(distance=distances.CosineSimilarity()),
    "uniform": miners.UniformHistogramMiner,
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("name", MINERS)
def test_miners_list_the_same_under_autocast(name: str, references: bool, dtype: torch.dtype) -> None:
    batch = rows(0).to(dtype), labels(0)
    others = (rows(4, M).to(dtype), labels(4, M)) if references else ()
    wide = [x.float() if x.is_floating_point() else x for x in (*batch, *others)]
    torch.manual_seed(0)
    wanted = MINERS[name]()(*wide)
    assert len(wanted[0])
    for cast_by in (None, *DTYPES):
        torch.manual_seed(0)
        with nullcontext() if cast_by is None else torch.autocast(HERE.type, dtype=cast_by):
            found = MINERS[name]()(*batch, *others)
        for mine, other in zip(found, wanted, strict=True):
            assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_half_precision_is_that_of_the_same_rows_in_float32(dtype: torch.dtype) -> None:
    query, reference = rows(0).to(dtype), rows(4, M).to(dtype)
    wanted = AccuracyCalculator(include=("precision_at_1", "r_precision", "mean_average_precision")).get_accuracy(
        query.float(), labels(0), reference.float(), labels(4, M)
    )
    for cast_by in (None, *DTYPES):
        with nullcontext() if cast_by is None else torch.autocast(HERE.type, dtype=cast_by):
            found = AccuracyCalculator(
                include=("precision_at_1", "r_precision", "mean_average_precision")
            ).get_accuracy(query, labels(0), reference, labels(4, M))
        assert found == wanted
