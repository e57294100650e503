"""Batches as no one means them: labels that are no numbers, tensors of other kinds, references like that."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from torch import Tensor

from gradbank import engine, losses, miners, reducers

E, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) // 2
R, RY = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), torch.arange(10) // 3
LOSSES = ("AngularLoss", "ContrastiveLoss", "FastAPLoss", "MultiSimilarityLoss", "NTXentLoss", "TripletMarginLoss")


def unlabelled() -> tuple[Tensor, Tensor]:
    """Rows of which a quarter have NaN for a label."""
    generator = torch.Generator().manual_seed(2)
    rows, labels = torch.randn(200, 8, generator=generator, dtype=torch.float64), (torch.arange(200) // 4).float()
    labels[torch.randperm(200, generator=generator)[:50]] = torch.nan
    return rows, labels


@pytest.mark.parametrize("engine_name", ["dense", "tiled"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_label_that_is_nan_is_that_of_no_other_row(name: str, engine_name: str) -> None:
    rows, labels = unlabelled()
    wanted = getattr(pml_losses, name)()(rows, labels)
    with engine.using(engine_name):
        torch.testing.assert_close(getattr(losses, name)()(rows, labels), wanted)


def test_a_miner_gives_rows_labelled_nan_no_positive_and_takes_them_for_negatives() -> None:
    rows, labels = unlabelled()
    for found, wanted in zip(
        miners.MultiSimilarityMiner()(rows, labels), pml_miners.MultiSimilarityMiner()(rows, labels), strict=True
    ):
        assert torch.equal(found.sort().values, wanted.sort().values)


def test_triplets_that_are_drawn_have_positives_of_the_anchors_label() -> None:
    _, labels = unlabelled()
    pairs = engine.LabelledPairs(labels, labels, torch.arange(len(labels)))
    a, p, n = pairs.draw(20)
    assert len(a)
    assert torch.equal(labels[a], labels[p])
    assert not (labels[a] == labels[n]).any()
    assert not (a == p).any()


@pytest.mark.parametrize(
    ("references", "labels", "message"),
    [
        (R.to("meta"), RY, "ref_emb must have entries, but is on the device meta"),
        (torch.complex(R, R), RY, "ref_emb must be floating point, got torch.complex64"),
        (R.int(), RY, "ref_emb must be floating point, got torch.int32"),
        (R.to_sparse(), RY, r"ref_emb must be dense, got layout torch.sparse_coo: make it dense with to_dense\(\)"),
        (R.numpy(), RY, r"ref_emb must be a tensor, got ndarray: torch.as_tensor\(ref_emb\) makes it one"),
        (R, RY.tolist(), "ref_labels must be a tensor, got list"),
        (R, RY + 1j, "ref_labels must be integers or floats, got torch.complex64"),
    ],
    ids=["meta", "complex", "integers", "sparse", "an array", "labels of a list", "complex labels"],
)
@pytest.mark.parametrize("whose", [losses.TripletMarginLoss, losses.NTXentLoss, miners.TripletMarginMiner])
def test_references_are_checked_as_the_batch_is(
    whose: Callable[[], Any], references: Any, labels: Any, message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        whose()(E, Y, ref_emb=references, ref_labels=labels)
    batch = message.replace("ref_emb", "embeddings").replace("ref_labels", "labels")
    with pytest.raises((TypeError, ValueError), match=batch):
        whose()(references, labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.bool])
def test_labels_may_be_integers_of_any_kind(dtype: torch.dtype) -> None:
    rows = torch.randn(32, 6, generator=torch.Generator().manual_seed(3))
    labels = (
        torch.arange(32) % 2 if dtype == torch.bool else torch.arange(32) // 4 * (9 if dtype.itemsize == 1 else 900)
    )
    given = labels.to(dtype)
    for made in (losses.ContrastiveLoss(), losses.NTXentLoss(), losses.SupConLoss()):
        assert torch.equal(made(rows, given), made(rows, labels))
    for miner in (miners.MultiSimilarityMiner(), miners.TripletMarginMiner()):
        for found, wanted in zip(miner(rows, given), miner(rows, labels), strict=True):
            assert torch.equal(found, wanted)
    few = torch.arange(32) % 2
    for head in (losses.P2SGradLoss(6, 2), losses.ArcFaceLoss(2, 6)):
        torch.testing.assert_close(head(rows, few.to(dtype)), head(rows, few))


def test_a_batch_of_float64_leaves_class_weights_as_wide_as_they_are() -> None:
    for head in (losses.P2SGradLoss(6, 4), losses.ArcFaceLoss(4, 6)):
        optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
        for rows in (E, E.double(), E):
            optimizer.zero_grad()
            head(rows, Y).backward()
            optimizer.step()
            assert {weight.dtype for weight in head.parameters()} == {torch.float32}


def test_weights_of_classes_are_one_number_each() -> None:
    with pytest.raises(ValueError, match=r"weights must be \(C,\), one for each class, got shape \(4, 1\)"):
        reducers.ClassWeightedReducer(torch.ones(4, 1))


def test_a_loss_of_an_angle_computes_where_its_batch_is() -> None:
    wanted = losses.TupletMarginLoss()(E, Y)
    try:
        torch.set_default_device("meta")
        found = losses.TupletMarginLoss()(E, Y)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch's own, in forward mode
@pytest.mark.parametrize("name", ["NTXentLoss", "ArcFaceLoss", "VICRegLoss"])
def test_differentiation_by_others_is_refused(name: str) -> None:
    made = getattr(losses, name)(*((4, 6) if name == "ArcFaceLoss" else ()))
    rest = {"ref_emb": R[:8]} if name == "VICRegLoss" else {"labels": Y}
    forwards = torch.autograd.forward_ad
    with forwards.dual_level(), pytest.raises(RuntimeError, match="not forward-mode differentiation"):
        made(forwards.make_dual(E, E), **rest)
    with pytest.raises(RuntimeError, match=r"not torch\.func"):
        torch.func.grad(lambda rows: made(rows, **rest))(E)


@pytest.mark.parametrize("name", ["NTXentLoss", "ArcFaceLoss", "ProxyAnchorLoss"])
def test_a_backward_pass_may_be_of_several_at_once(name: str) -> None:
    made = getattr(losses, name)(*(() if name == "NTXentLoss" else (4, 6)))
    rows = E.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(made(rows, Y), rows)
    (found,) = torch.autograd.grad(made(rows, Y), rows, torch.tensor([1.0, -2.0]), is_grads_batched=True)
    torch.testing.assert_close(found, torch.stack([wanted, -2 * wanted]))
