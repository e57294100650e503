"""P2SGradLoss: PML's value, gradients and training, by either form."""

import copy
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from torch import Tensor, nn

from gradbank import losses

# batch, dimension, classes: the closed form is the cheaper one in the last three
SIZES = [(5, 8, 3), (1, 4, 1), (12, 4, 6), (60, 3, 40), (40, 2, 60), (7, 1, 9)]


def both(dimension: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The loss here and PML's, with the same weights."""
    made = []
    for library in (losses, pml_losses):
        torch.manual_seed(0)
        made.append(library.P2SGradLoss(dimension, classes).to(dtype))
    return made[0], made[1]


def batch_of(size: int, dimension: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, dimension, dtype=dtype), torch.randint(classes, (size,))


def answers(loss: Any, embeddings: Tensor, labels: Tensor) -> list[Tensor]:
    """The value, and the gradients of embeddings and weights."""
    leaf = embeddings.clone().requires_grad_()
    loss.zero_grad()
    value = loss(leaf, labels)
    value.backward()
    return [value.detach(), leaf.grad, loss.weight.grad.clone()]


def test_both_draw_the_same_weights() -> None:
    ours, theirs = both(5, 7, torch.float32)
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize(("size", "dimension", "classes"), SIZES)
def test_p2sgrad_equals_pml(size: int, dimension: int, classes: int) -> None:
    ours, theirs = both(dimension, classes)
    drawn = batch_of(size, dimension, classes)
    torch.testing.assert_close(answers(ours, *drawn), answers(theirs, *drawn), rtol=1e-9, atol=1e-12)


def test_no_matrix_of_cosines_is_made_where_it_would_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    multiply = Tensor.__matmul__

    def noted(a: Tensor, b: Tensor) -> Tensor:
        made.append(len(a) * b.shape[1])
        return multiply(a, b)

    ours, _ = both(4, 300)
    monkeypatch.setattr(Tensor, "__matmul__", noted)
    ours(*batch_of(200, 4, 300))
    assert made
    assert max(made) <= (200 + 300) * 4


def test_training_equals_that_of_pml() -> None:
    """The weights are brought back to length 1 at each call, which is a part of the training."""
    drawn = batch_of(30, 3, 20)
    made = both(3, 20)
    for loss in made:
        optimizer = torch.optim.SGD(loss.parameters(), lr=5, momentum=0.5)
        for _ in range(10):
            optimizer.zero_grad()
            loss(*drawn).backward()
            optimizer.step()
    torch.testing.assert_close(made[0].weight, made[1].weight, rtol=1e-9, atol=1e-12)


def test_a_graph_keeps_the_weights_it_was_made_with() -> None:
    ours, _ = both(3, 20)
    drawn = batch_of(30, 3, 20)
    wanted = answers(copy.deepcopy(ours), *drawn)[2]
    ours.zero_grad()
    value = ours(*drawn)
    ours(*batch_of(4, 3, 20))
    value.backward()
    assert torch.equal(ours.weight.grad, wanted)


def test_an_embedding_of_zeros_has_cosine_zero_with_every_class() -> None:
    """PML divides by its length, and gives NaN."""
    ours, theirs = both(4, 6)
    embeddings, labels = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([2])
    value, gradient, _ = answers(ours, embeddings, labels)
    assert float(value) == pytest.approx(1 / 6)
    assert bool(gradient.isfinite().all())
    assert bool(theirs(embeddings, labels).isnan())


def test_closed_form_is_as_exact_in_float32() -> None:
    ours, _ = both(8, 100)
    embeddings, labels = batch_of(500, 8, 100)
    wanted = answers(ours, embeddings, labels)
    found = answers(ours.float(), embeddings.float(), labels)
    torch.testing.assert_close([each.double() for each in found], wanted, rtol=1e-4, atol=1e-7)


def test_weights_are_as_wide_as_they_were_whatever_the_batch() -> None:
    ours, _ = both(4, 6, torch.float32)
    embeddings, labels = batch_of(5, 4, 6)
    for dtype in (torch.float16, torch.float64, torch.float32):
        ours.zero_grad()
        leaf = embeddings.to(dtype, copy=True).requires_grad_()
        ours(leaf, labels).backward()
        assert ours.weight.dtype == ours.weight.grad.dtype == torch.float32
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype


def test_an_empty_batch_costs_nothing() -> None:
    ours, _ = both(4, 6)
    value, gradient, _ = answers_of_none(ours)
    assert float(value) == 0
    assert gradient.shape == (0, 4)


def answers_of_none(loss: Any) -> tuple[Tensor, Tensor, None]:
    leaf = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    value = loss(leaf, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad, None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs labels"),
        ({"labels": torch.tensor([0, 6, 1])}, r"0\.\.5 .*got 0\.\.6"),
        ({"labels": torch.tensor([0.0, 1.0, 1.0])}, "integers"),
        ({"labels": torch.arange(3), "ref_emb": torch.ones(3, 4)}, "takes no ref_emb"),
        ({"labels": torch.arange(3), "ref_labels": torch.arange(3)}, "ref_labels"),
        ({"labels": torch.arange(3), "indices_tuple": (torch.arange(2),) * 3}, "takes no indices_tuple"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: Any, message: str) -> None:
    ours, _ = both(4, 6, torch.float32)
    with pytest.raises(ValueError, match=message):
        ours(torch.ones(3, 4), **arguments)


def test_another_dimension_is_refused() -> None:
    ours, _ = both(4, 6, torch.float32)
    with pytest.raises(ValueError, match="have dimension 5, but P2SGradLoss was built with descriptors_dim=4"):
        ours(torch.ones(3, 5), torch.arange(3))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_sizes_must_be_positive(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be a whole number, at least 1, got 0"):
        losses.P2SGradLoss(*sizes)
