"""Where gradbank differs from PML on purpose, in what is called how: rows of the table in docs/losses.md, shown."""

import math
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning import reducers as pml_reducers
from pytorch_metric_learning import regularizers as pml_regularizers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator as PMLAccuracyCalculator
from torch import Tensor

from gradbank import losses, miners, reducers, regularizers
from gradbank.errors import NonFiniteError
from gradbank.evaluation import AccuracyCalculator


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(24, 8), torch.arange(24) % 6


def test_class_weights_keep_their_dtype() -> None:
    embeddings, labels = batch()
    ours, theirs = losses.NormalizedSoftmaxLoss(6, 8), pml.NormalizedSoftmaxLoss(6, 8)
    for loss, dtype in ((ours, torch.float32), (theirs, torch.float64)):
        loss(embeddings.double(), labels).backward()
        assert loss.W.dtype == loss.W.grad.dtype == dtype
    ours.double()(embeddings.double(), labels)
    assert ours.W.dtype == torch.float64


def test_a_queue_keeps_its_dtype() -> None:
    embeddings, labels = batch()
    ours, theirs = (each.CrossBatchMemory(each.ContrastiveLoss(), 8, 64) for each in (losses, pml))
    for queue, dtype in ((ours, torch.float32), (theirs, torch.float64)):
        queue(embeddings, labels)
        queue(embeddings.double(), labels)
        assert queue.embedding_memory.dtype == dtype


def test_half_precision_comes_back_in_float32() -> None:
    embeddings, labels = batch()
    assert losses.TripletMarginLoss()(embeddings.half(), labels).dtype == torch.float32
    assert pml.TripletMarginLoss()(embeddings.half(), labels).dtype == torch.float16


def test_arguments_are_attributes_as_they_were_given() -> None:
    assert losses.AngularLoss(alpha=45).alpha == 45
    assert float(pml.AngularLoss(alpha=45).alpha) == pytest.approx(math.pi / 4)
    assert losses.SoftTripleLoss(6, 8, gamma=0.1).gamma == 0.1
    assert pml.SoftTripleLoss(6, 8, gamma=0.1).gamma == pytest.approx(10)


def test_a_reducer_is_the_one_that_was_given() -> None:
    ours, theirs = reducers.ThresholdReducer(low=0), pml_reducers.ThresholdReducer(low=0)
    assert losses.TripletMarginLoss(reducer=ours).reducer is ours
    assert pml.TripletMarginLoss(reducer=theirs).reducer is not theirs


def test_pairs_that_a_miner_lists_are_the_same_in_another_order() -> None:
    embeddings, labels = batch()
    for name in ("MultiSimilarityMiner", "TripletMarginMiner"):
        ours, theirs = getattr(miners, name)()(embeddings, labels), getattr(pml_miners, name)()(embeddings, labels)
        for some in (slice(2), slice(2, None)) if len(ours) == 4 else (slice(3),):
            listed = [list(zip(*(index.tolist() for index in found[some]))) for found in (ours, theirs)]
            assert sorted(listed[0]) == sorted(listed[1])
        assert not all(map(torch.equal, ours, theirs))
    # which is another loss where it takes the first pair of each label
    mined = [kind.MultiSimilarityMiner()(embeddings, labels) for kind in (miners, pml_miners)]
    found, wanted = (float(losses.NPairsLoss()(embeddings, labels, each)) for each in mined)
    assert found != pytest.approx(wanted, rel=1e-3)
    assert float(pml.NPairsLoss()(embeddings, labels, mined[0])) == pytest.approx(found)


def test_labels_of_references_need_references() -> None:
    embeddings, labels = batch()
    pml.NTXentLoss()(embeddings, labels, ref_labels=labels + 1)
    with pytest.raises(ValueError, match="ref_labels are the labels of ref_emb"):
        losses.NTXentLoss()(embeddings, labels, ref_labels=labels + 1)


def test_places_are_not_counted_from_the_end() -> None:
    embeddings, labels = batch()
    named = tuple(torch.tensor(index) for index in ([0, 1], [-1, -2], [0], [3]))
    pml.ContrastiveLoss()(embeddings, labels, named)
    with pytest.raises(ValueError, match="positive"):
        losses.ContrastiveLoss()(embeddings, labels, named)


def test_an_empty_batch_costs_nothing() -> None:
    embeddings, labels = torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64)
    assert losses.NormalizedSoftmaxLoss(6, 8)(embeddings, labels).item() == 0
    assert bool(pml.NormalizedSoftmaxLoss(6, 8)(embeddings, labels).isnan())


def test_a_row_of_nan_is_seen() -> None:
    embeddings, labels = batch()
    embeddings[3] = torch.nan
    for name, given in (
        ("TripletMarginLoss", {}),
        ("SignalToNoiseRatioContrastiveLoss", {}),
        ("RankedListLoss", {"margin": 0.4, "Tn": 3}),
    ):
        assert bool(getattr(pml, name)(**given)(embeddings, labels).isfinite()), name
        assert bool(getattr(losses, name)(**given)(embeddings, labels).isnan()), name


def test_a_calculator_refuses_what_it_would_not_use() -> None:
    embeddings, labels = batch()
    ours = AccuracyCalculator(include=("precision_at_1",), k=3, device="cpu")
    theirs = PMLAccuracyCalculator(include=("precision_at_1",), k=3, device=torch.device("cpu"))
    theirs.get_accuracy(embeddings, labels, None, labels)
    assert theirs.get_accuracy(embeddings, labels, include=("nope",)) == {}
    with pytest.raises(ValueError, match="belong together"):
        ours.get_accuracy(embeddings, labels, None, labels)
    embeddings[3, 1] = torch.nan
    theirs.get_accuracy(embeddings, labels, torch.randn(9, 8), torch.arange(9))
    with pytest.raises(NonFiniteError, match="row 3"):
        ours.get_accuracy(embeddings, labels, torch.randn(9, 8), torch.arange(9))
    with pytest.raises(ValueError, match="no metric is called 'nope'"):
        ours.get_accuracy(embeddings, labels, include=("nope",))


def test_a_loss_cannot_be_transformed_by_torch_func() -> None:
    embeddings, labels = batch()
    torch.func.grad(lambda rows: pml.NTXentLoss()(rows, labels))(embeddings)
    with pytest.raises(RuntimeError, match="computes its gradient itself"):
        torch.func.grad(lambda rows: losses.NTXentLoss()(rows, labels))(embeddings)


@pytest.mark.parametrize("part", ["distance", "reducer"])
def test_what_a_loss_is_made_of_is_declared_and_not_called(part: str) -> None:
    counts = []
    for library in (losses, pml):
        loss_fn, calls = library.TripletMarginLoss(), []
        getattr(loss_fn, part).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        loss_fn(torch.randn(8, 4), torch.arange(8) // 2)
        counts.append(len(calls))
    assert counts == [0, 1]


def test_a_queue_that_is_two_losses_is_entered_once() -> None:
    rows, labels = torch.randn(12, 6), torch.arange(12) // 3
    ours = losses.CrossBatchMemory(losses.NTXentLoss(), 6, memory_size=40)
    theirs = pml.CrossBatchMemory(pml.NTXentLoss(), 6, memory_size=40)
    losses.MultipleLosses([ours, ours])(rows, labels)
    pml.MultipleLosses([theirs, theirs])(rows, labels)
    assert (ours.queue_idx, theirs.queue_idx) == (12, 24)


def test_the_cost_of_a_regularizer_is_added_to_what_a_reducer_of_ones_own_gives() -> None:
    def tripled(module: Any) -> Any:
        class Tripled(module.MeanReducer):  # type: ignore[misc]
            def already_reduced_reduction(self, losses: Tensor, *rest: Any) -> Tensor:
                return 3 * losses

        return Tripled()

    rows, labels = torch.randn(12, 6), torch.arange(12) // 3
    plain = losses.ContrastiveLoss(reducer=reducers.MeanReducer())(rows, labels)
    cost = regularizers.LpRegularizer()(rows)
    ours = losses.ContrastiveLoss(reducer=tripled(reducers), embedding_regularizer=regularizers.LpRegularizer())
    theirs = pml.ContrastiveLoss(reducer=tripled(pml_reducers), embedding_regularizer=pml_regularizers.LpRegularizer())
    torch.testing.assert_close(ours(rows, labels), plain + cost)
    torch.testing.assert_close(theirs(rows, labels), plain + 3 * cost)


def test_weights_that_no_pair_reaches_move_on_by_momentum() -> None:
    rows, found = torch.randn(12, 6), []
    for module in (losses, pml):
        loss_fn = module.MarginLoss(learn_beta=True)
        optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.01)
        for labels in (torch.arange(12) // 3, torch.arange(12)):  # the second of one row each
            optimizer.zero_grad()
            loss_fn(rows.clone().requires_grad_(), labels).backward()
            before = loss_fn.beta.item()
            optimizer.step()
        found.append(loss_fn.beta.item() != before)
    assert found == [True, False]
