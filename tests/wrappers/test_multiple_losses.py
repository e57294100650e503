"""MultipleLosses: the weighted sum of losses, as in PML, and all of them or none."""

from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from torch import Tensor, nn

from gradbank import losses, miners, regularizers
from gradbank.wrappers import CrossBatchMemory, MultipleLosses, SelfSupervisedLoss

NAMES = ["a", "b", "c"]
WEIGHTS = [1, 0.25, 3.0]


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(12, 6, dtype=torch.float64), torch.randint(4, (12,))


def answers(loss: nn.Module, *rest: Any, seed: int = 0) -> list[Tensor]:
    embeddings, labels = batch(seed)
    leaf = embeddings.requires_grad_()
    value = loss(leaf, labels, *rest)
    value.backward()
    assert leaf.grad is not None
    return [value.detach(), leaf.grad]


def several(library: Any, mining: Any, form: str, mined: bool, weighted: bool) -> Any:
    torch.manual_seed(1)
    made = [library.ContrastiveLoss(), library.TripletMarginLoss(0.1), library.ArcFaceLoss(4, 6).double()]
    chosen = [None, mining.MultiSimilarityMiner(), None]
    if form == "list":
        return library.MultipleLosses(made, chosen if mined else None, WEIGHTS if weighted else None)
    return library.MultipleLosses(
        dict(zip(NAMES, made, strict=True)),
        miners={"b": chosen[1]} if mined else None,
        weights=dict(zip(NAMES, WEIGHTS, strict=True)) if weighted else None,
    )


@pytest.mark.parametrize("form", ["list", "dict"])
@pytest.mark.parametrize("mined", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_multiple_losses_equal_pml(form: str, mined: bool, weighted: bool) -> None:
    ours, theirs = (
        several(library, mining, form, mined, weighted)
        for library, mining in ((losses, miners), (pml_losses, pml_miners))
    )
    torch.testing.assert_close(answers(ours), answers(theirs), rtol=1e-9, atol=1e-12)
    given, wanted = (dict(each.named_parameters()) for each in (ours, theirs))
    assert list(given) == list(wanted)
    for name, parameter in given.items():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["list", "dict"])
def test_indices_reach_every_loss(form: str) -> None:
    embeddings, labels = batch()
    indices = pml_miners.MultiSimilarityMiner()(embeddings, labels)
    ours, theirs = (
        several(library, mining, form, False, True) for library, mining in ((losses, miners), (pml_losses, pml_miners))
    )
    torch.testing.assert_close(answers(ours, indices), answers(theirs, indices), rtol=1e-9, atol=1e-12)


def test_losses_can_be_looked_up() -> None:
    listed, named = (several(losses, miners, form, True, True) for form in ("list", "dict"))
    assert not listed.is_dict
    assert named.is_dict
    assert isinstance(listed.losses[1], losses.TripletMarginLoss)
    assert isinstance(named.losses["b"], losses.TripletMarginLoss)
    assert isinstance(named.miners["b"], miners.MultiSimilarityMiner)
    assert listed.weights[1] == named.weights["b"] == 0.25


TWO = {"a": losses.ContrastiveLoss(), "b": losses.TripletMarginLoss()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses": list(TWO.values()), "weights": [1]}, "2 losses, so there must be as many weights, got 1"),
        ({"losses": list(TWO.values()), "miners": [None]}, "2 losses, so there must be as many miners, got 1"),
        ({"losses": list(TWO.values()), "weights": {"a": 1, "b": 2}}, "losses are a list, so weights must be one too"),
        ({"losses": TWO, "weights": [1, 2]}, "losses are a dictionary, so weights must be one too, got list"),
        ({"losses": TWO, "weights": {"a": 1}}, r"weights are missing for \['b'\]"),
        ({"losses": TWO, "weights": {"a": 1, "blah": 2}}, r"weights are given for \['blah'\]"),
        ({"losses": TWO, "miners": {"blah": miners.MultiSimilarityMiner()}}, r"miners are given for \['blah'\]"),
    ],
)
@pytest.mark.parametrize("error", [ValueError, AssertionError])  # PML asserts these
def test_miners_and_weights_belong_to_the_losses(arguments: Any, message: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=message):
        MultipleLosses(**arguments)


def test_at_least_one_loss_is_needed() -> None:
    for none in ([], {}):
        with pytest.raises(ValueError, match="at least one loss"):
            MultipleLosses(none)


@pytest.mark.parametrize("error", [ValueError, AssertionError])
def test_miners_exclude_indices(error: type[Exception]) -> None:
    embeddings, labels = batch()
    several_losses = MultipleLosses(list(TWO.values()), [None, miners.MultiSimilarityMiner()])
    with pytest.raises(error, match="leave indices_tuple out"):
        several_losses(embeddings, labels, (torch.zeros(0, dtype=torch.int64),) * 3)


class Failing(losses.Loss):
    def forward(self, embeddings: Tensor, labels: Tensor, indices_tuple: Any = None) -> Tensor:
        raise ValueError("no loss today")


def test_a_loss_that_fails_leaves_a_bank_beside_it_as_it_was() -> None:
    bank = CrossBatchMemory(losses.NTXentLoss(), 6, 20)
    embeddings, labels = (batch()[0].float(), batch()[1])
    bank(embeddings, labels)
    rows, cursor = bank.embedding_memory.clone(), bank.queue_idx
    for made in (MultipleLosses([bank, Failing()]), MultipleLosses({"first": Failing(), "second": bank})):
        with pytest.raises(ValueError, match="no loss today"):
            made(embeddings, labels)
        assert (len(bank), bank.queue_idx) == (12, cursor)
        assert torch.equal(bank.embedding_memory, rows)


def test_banks_inside_remember() -> None:
    def made() -> list[Any]:
        return [CrossBatchMemory(losses.NTXentLoss(), 6, 20), CrossBatchMemory(losses.ContrastiveLoss(), 6, 30)]

    together, apart = MultipleLosses(made(), weights=[1, 0.5]), made()
    for seed in range(4):
        embeddings, labels = batch(seed)
        wanted = apart[0](embeddings, labels) + apart[1](embeddings, labels) * 0.5
        torch.testing.assert_close(together(embeddings, labels), wanted, rtol=1e-12, atol=0)
    for inside, alone in zip(together.losses, apart, strict=True):
        assert torch.equal(inside.embedding_memory, alone.embedding_memory)


def test_nothing_happens_before_the_commit() -> None:
    bank = CrossBatchMemory(losses.NTXentLoss(), 6, 20)
    staged = MultipleLosses([bank]).stage(*batch())
    assert len(bank) == 0
    staged.commit()
    assert len(bank) == 12


def test_a_module_that_is_not_of_gradbank_is_simply_called() -> None:
    theirs, ours = pml_losses.ContrastiveLoss(), losses.TripletMarginLoss()
    embeddings, labels = batch()
    found = MultipleLosses([theirs, ours])(embeddings, labels)  # type: ignore[list-item]
    torch.testing.assert_close(found, theirs(embeddings, labels) + ours(embeddings, labels))


def test_a_regularizer_is_added_once() -> None:
    cost, (embeddings, labels) = regularizers.LpRegularizer(), batch()
    plain = MultipleLosses(list(TWO.values()))
    with_cost = MultipleLosses(list(TWO.values()), embedding_regularizer=cost, embedding_reg_weight=2)
    torch.testing.assert_close(with_cost(embeddings, labels), plain(embeddings, labels) + 2 * cost(embeddings))


@pytest.mark.parametrize("form", ["list", "dict"])
def test_multiple_losses_are_built_again_from_their_arguments(form: str) -> None:
    loss = several(losses, miners, form, True, True)
    copy = loss.rebuilt()
    copy.load_state_dict(loss.state_dict())
    assert copy.spec() == loss.spec()
    torch.testing.assert_close(answers(copy.double()), answers(loss), rtol=1e-6, atol=1e-8)


def test_wrappers_are_losses_too() -> None:
    for kind in (CrossBatchMemory, MultipleLosses, SelfSupervisedLoss):
        assert getattr(losses, kind.__name__) is kind


@pytest.mark.parametrize("weights", [torch.tensor([1.0, 0.5]), np.array([1.0, 0.5])], ids=["tensor", "array"])
def test_weights_may_be_a_tensor(weights: Any) -> None:
    loss = MultipleLosses(list(TWO.values()), weights=weights)
    assert loss.spec().arguments["weights"] == loss.weights == [1.0, 0.5]
