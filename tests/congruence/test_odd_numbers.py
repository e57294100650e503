"""Where a formula meets a zero, an infinity, or a mode of torch: as the plain formula says."""

from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.reducers as pml_reducers
import torch
from torch import Tensor

from gradbank import distances, engine, losses, miners, reducers

SMALL = engine.Bounds(tile=60, rows=4)


def batch(size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 8, dtype=dtype, generator=generator), torch.arange(size) // 4


def gradient(loss: Any, rows: Tensor, *rest: Any) -> list[Tensor]:
    leaf = rows.clone().requires_grad_()
    value = loss(leaf, *rest)
    return [value.detach(), torch.autograd.grad(value, leaf)[0]]


# -- nothing to divide by --------------------------------------------------------------------------------------------


def test_a_batch_that_violates_no_margin_costs_nothing_whatever_is_learned() -> None:
    rows = torch.eye(4, dtype=torch.float64).repeat_interleave(8, 0) + 1e-3 * torch.randn(32, 4, dtype=torch.float64)
    options: dict[str, Any] = {"margin": 0.2, "beta": 0.9, "nu": 0.1, "learn_beta": True, "num_classes": 4}
    for name in ("dense", "tiled"):
        with engine.using(name, SMALL if name == "tiled" else None):
            for scale in (0, 3):  # none is violated, and some are
                given = rows + scale * torch.randn(32, 4, dtype=torch.float64)
                here, there = (library.MarginLoss(**options).double() for library in (losses, pml_losses))
                found, wanted = (each(given, torch.arange(32) // 8) for each in (here, there))
                torch.testing.assert_close(found, wanted)
                assert (float(found.detach()) == 0) == (scale == 0)


@pytest.mark.parametrize("divisor", [0, 4, -2])
def test_a_divisor_is_what_is_divided_by(divisor: int) -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    part = {"losses": values, "indices": torch.arange(3), "reduction_type": "element", "divisor": divisor}
    found, wanted = (of.DivisorReducer()({"loss": part}, torch.randn(3, 2), None) for of in (reducers, pml_reducers))
    assert float(found) == float(wanted)


def test_a_part_that_is_reduced_already_may_have_a_divisor() -> None:
    part = {"losses": torch.tensor(2.0), "indices": None, "reduction_type": "already_reduced", "divisor": 3}
    assert float(reducers.DivisorReducer()({"loss": part}, torch.randn(3, 2), None)) == 2


# -- inference mode --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [40, 600])
@pytest.mark.parametrize(
    "made",
    [
        *(lambda: losses.NTXentLoss(), lambda: losses.ContrastiveLoss(), lambda: losses.SmoothAPLoss()),
        *(lambda: losses.TripletMarginLoss(smooth_loss=True), lambda: losses.AngularLoss()),
        lambda: losses.MarginLoss(reducer=reducers.ThresholdReducer(low=0.1)),
        *(lambda: losses.SphereFaceLoss(150, 8), lambda: losses.FastAPLoss(), lambda: losses.PNPLoss()),
        lambda: losses.CrossBatchMemory(losses.NTXentLoss(), 8, 900),
        lambda: losses.MultipleLosses([losses.NTXentLoss(), losses.TripletMarginLoss()]),
    ],
    ids=lambda made: type(made()).__name__,
)
def test_inference_mode_is_as_no_grad_and_its_tensors_as_others(made: Any, size: int) -> None:
    rows, labels = batch(size, torch.float32)
    torch.manual_seed(0)
    loss = made()
    with torch.no_grad():
        wanted = loss(rows, labels)
    for outside in (False, True):
        torch.manual_seed(0)
        loss = made()
        with torch.inference_mode():
            copy, known = rows.clone(), labels.clone()
            found = None if outside else loss(copy, known)
        found = loss(copy, known) if outside else found
        assert torch.equal(found, wanted)
        assert outside or not found.requires_grad
    with torch.inference_mode():
        among = losses.NTXentLoss()(copy, known, ref_emb=copy, ref_labels=known)
    assert torch.equal(among, losses.NTXentLoss()(rows, labels))


@pytest.mark.parametrize("size", [40, 600])
@pytest.mark.parametrize("made", [losses.TripletMarginLoss, losses.MarginLoss, losses.ContrastiveLoss])
def test_indices_may_be_mined_in_inference_mode(made: Any, size: int) -> None:
    rows, labels = batch(size, torch.float32)
    with torch.inference_mode():
        mined = miners.TripletMarginMiner()(rows, labels)
    assert mined[0].is_inference()
    wanted = gradient(made(), rows, labels, tuple(each.clone() for each in mined))
    for found, value in zip(gradient(made(), rows, labels, mined), wanted, strict=True):
        torch.testing.assert_close(found, value)


# -- infinities and zeros --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e14, 1e18])
def test_a_very_long_row_has_its_gradient(scale: float) -> None:
    rows, labels = batch(8, torch.float32)
    labels = labels % 2
    _, wanted = gradient(losses.NTXentLoss(), rows.double(), labels)
    rows[1] *= scale
    _, found = gradient(losses.NTXentLoss(), rows, labels)
    torch.testing.assert_close((found[1].double() * scale), wanted[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["GeneralizedLiftedStructureLoss", "MultiSimilarityLoss", "NTXentLoss", "SupConLoss"])
@pytest.mark.parametrize("way", ["dense", "tiled"])
def test_an_infinite_distance_that_nobody_listed_spoils_nothing(name: str, way: str) -> None:
    rows = batch(4)[0]
    rows[3] *= 1e200
    pairs = tuple(torch.tensor(each) for each in ([0, 1], [1, 0], [0, 1], [2, 2]))
    with engine.using(way, SMALL if way == "tiled" else None):
        loss = getattr(losses, name)(distance=distances.DotProductSimilarity(normalize_embeddings=False))
        found = loss(rows, None, pairs)
    theirs = getattr(pml_losses, name)(distance=pml_distances.DotProductSimilarity(normalize_embeddings=False))
    torch.testing.assert_close(found, theirs(rows, None, pairs), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("p", [1, 2, torch.inf])
def test_a_root_of_no_distance_has_no_slope(p: float) -> None:
    rows, labels = batch(12)
    value, found = gradient(losses.ContrastiveLoss(distance=distances.LpDistance(p=p, power=0.5)), rows, labels)
    theirs = pml_losses.ContrastiveLoss(distance=pml_distances.LpDistance(p=p, power=0.5))
    torch.testing.assert_close(value, theirs(rows, labels))
    assert found.isfinite().all()
    assert found.any()


# -- the angular loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "miner", [miners.PairMarginMiner(), miners.MultiSimilarityMiner()], ids=["margin", "similarity"]
)
def test_a_miner_may_find_an_empty_queue(miner: Any) -> None:
    rows, labels = batch(3)
    memory = losses.CrossBatchMemory(losses.AngularLoss(), 8, 16, miner=miner).double()
    none = torch.zeros(3, dtype=torch.bool)
    assert float(memory(rows, labels, enqueue_mask=none)) == 0
    assert len(memory) == 0


def test_listed_positives_that_the_labels_deny_have_their_negatives() -> None:
    rows, references = batch(3)[0], batch(5)[0][3:]
    listed = tuple(torch.tensor(each) for each in ([0, 1], [0, 0], [1, 1]))
    known = torch.zeros(3, dtype=torch.long), torch.ones(2, dtype=torch.long)
    found, wanted = (
        library.AngularLoss()(rows, known[0], listed, references, known[1]) for library in (losses, pml_losses)
    )
    assert float(wanted) > 0
    torch.testing.assert_close(found, wanted)
