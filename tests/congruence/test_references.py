"""Uses beside a batch against itself: references of one's own, listed pairs, rows that only enter a queue."""

from typing import Any, NamedTuple

import pytest
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.miners as pml_miners
import torch
from torch import Tensor, nn

import gradbank
from gradbank import losses, miners

PAIR_LOSSES = ("ContrastiveLoss", "MultiSimilarityLoss", "NTXentLoss", "SupConLoss", "TripletMarginLoss")

pytestmark = pytest.mark.parametrize("loss", PAIR_LOSSES)


class Answer(NamedTuple):
    value: Tensor
    gradient: Tensor
    ref_gradient: Tensor | None


def answer(loss: nn.Module, embeddings: Tensor, ref_emb: Tensor | None = None, **rest: Any) -> Answer:
    leaf = embeddings.clone().requires_grad_()
    ref_leaf = None if ref_emb is None else ref_emb.clone().requires_grad_()
    if ref_leaf is not None:
        rest["ref_emb"] = ref_leaf
    value = loss(leaf, **rest)
    value.backward()
    assert leaf.grad is not None
    return Answer(value.detach(), leaf.grad, None if ref_leaf is None else ref_leaf.grad)


def same(found: Answer, wanted: Answer) -> bool:
    return all(f is w is None or torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def agree(found: Answer, wanted: Answer) -> bool:
    pairs = [(f, w) for f, w in zip(found, wanted, strict=True) if w is not None]
    return all(float((f - w).norm()) <= 1e-9 * float(w.norm()) + 1e-13 for f, w in pairs)


def drawn(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(rows, 8, dtype=dtype), torch.randint(5, (rows,))


def test_references_get_their_gradient(loss: str, host: gradbank.Client, name: str) -> None:
    (embeddings, labels), (ref_emb, ref_labels) = drawn(10), drawn(17, seed=1)
    remote = host.open(name, getattr(losses, loss)())
    here = answer(getattr(losses, loss)(), embeddings, ref_emb, labels=labels, ref_labels=ref_labels)
    there = answer(remote, embeddings, ref_emb, labels=labels, ref_labels=ref_labels)
    assert here.ref_gradient is not None
    assert here.ref_gradient.any()
    assert same(there, here)
    exact = {"labels": labels, "ref_labels": ref_labels}
    assert agree(
        answer(getattr(losses, loss)(), embeddings.double(), ref_emb.double(), **exact),
        answer(getattr(pml_losses, loss)(), embeddings.double(), ref_emb.double(), **exact),
    )


@pytest.mark.parametrize("told", ["the labels themselves", "no labels", "equal labels"])
def test_same_label_object_says_that_a_reference_is_its_anchor(
    loss: str, told: str, host: gradbank.Client, name: str
) -> None:
    (embeddings, labels), (ref_emb, _) = drawn(10, dtype=torch.float64), drawn(10, seed=1, dtype=torch.float64)
    ref_labels = {"the labels themselves": labels, "no labels": None, "equal labels": labels.clone()}[told]
    rest = {"labels": labels, "ref_labels": ref_labels}
    here = answer(getattr(losses, loss)(), embeddings, ref_emb, **rest)
    assert agree(here, answer(getattr(pml_losses, loss)(), embeddings, ref_emb, **rest))
    assert same(answer(host.open(name, getattr(losses, loss)()), embeddings, ref_emb, **rest), here)


@pytest.mark.parametrize("form", ["triplets", "pairs"])
@pytest.mark.parametrize("labelled", [True, False])
def test_listed_indices_need_no_labels(loss: str, form: str, labelled: bool, host: gradbank.Client, name: str) -> None:
    embeddings, labels = drawn(14, dtype=torch.float64)
    listed = miners.MultiSimilarityMiner()(embeddings, labels)
    if form == "triplets":
        joined = (listed[0][:, None] == listed[2]).nonzero()
        listed = (listed[0][joined[:, 0]], listed[1][joined[:, 0]], listed[3][joined[:, 1]])
    rest = {"labels": labels if labelled else None, "indices_tuple": listed}
    here = answer(getattr(losses, loss)(), embeddings, **rest)
    assert here.gradient.any()
    assert agree(here, answer(getattr(pml_losses, loss)(), embeddings, **rest))
    assert same(answer(host.open(name, getattr(losses, loss)()), embeddings, **rest), here)


@pytest.mark.parametrize("mined", [True, False])
def test_rows_of_the_mask_only_enter_the_queue(loss: str, mined: bool, host: gradbank.Client, name: str) -> None:
    """As in MoCo: the keys of the second half enter, the queries of the first are compared."""

    def queue(library: Any, mining: Any) -> Any:
        miner = mining.MultiSimilarityMiner() if mined else None
        return library.CrossBatchMemory(getattr(library, loss)(), 8, 30, miner)

    here, theirs = queue(losses, miners), queue(pml_losses, pml_miners)
    remote, positions = host.open(name, here), queue(losses, miners)
    mask = torch.arange(16) >= 8
    for step in range(12):
        embeddings, labels = drawn(16, seed=step, dtype=torch.float64)
        mine = answer(here, embeddings, labels=labels, enqueue_mask=mask)
        assert agree(mine, answer(theirs, embeddings, labels=labels, enqueue_mask=mask))
        assert not mine.gradient[mask].any()
        assert same(answer(remote, embeddings, labels=labels, enqueue_mask=mask), mine)
        assert same(answer(positions, embeddings, labels=labels, enqueue_idx=mask.nonzero()[:, 0]), mine)
    assert here.has_been_filled


def test_positions_equal_a_mask_remotely(loss: str, host: gradbank.Client, name: str) -> None:
    by_mask = losses.CrossBatchMemory(getattr(losses, loss)(), 8, 30)
    remote = host.open(name, by_mask)
    for step in range(6):
        embeddings, labels = drawn(12, seed=step)
        positions = torch.randperm(12)[:5]
        mask = torch.zeros(12, dtype=torch.bool)
        mask[positions] = True
        wanted = answer(by_mask, embeddings, labels=labels, enqueue_mask=mask)
        assert same(answer(remote, embeddings, labels=labels, enqueue_idx=positions), wanted)
