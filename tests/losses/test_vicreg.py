"""VICRegLoss: PML's value and gradients, without a covariance matrix."""

from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import reducers as pml_reducers
from torch import Tensor, nn

from gradbank import distances, losses, reducers, regularizers
from gradbank.losses import vicreg

SIZES = [(40, 6), (12, 12), (8, 12), (6, 12), (5, 12), (2, 12), (9, 1)]


def views(batch: int, dimension: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    first = torch.randn(batch, dimension, dtype=torch.float64) @ torch.randn(dimension, dimension, dtype=torch.float64)
    return first.to(dtype) * 0.3, (first + 0.1 * torch.randn_like(first)).to(dtype) * 0.3


def answers(loss: nn.Module, *given: Tensor) -> list[Tensor]:
    """The value, and the gradient with respect to each view."""
    leaves = [each.clone().requires_grad_() for each in given]
    value = loss(leaves[0], ref_emb=leaves[1]) if len(leaves) == 2 else loss(leaves[0])
    value.backward()
    assert all(leaf.grad is not None for leaf in leaves)
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(("batch", "dimension"), SIZES)
@pytest.mark.parametrize("tile", [1, 30, 2**22])
def test_vicreg_equals_pml_however_it_is_tiled(
    batch: int, dimension: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vicreg, "TILE", tile)
    given = views(batch, dimension)
    for weights in ((25, 25, 1, 1e-4), (1, 2, 30, 1e-3)):
        found, wanted = (answers(library.VICRegLoss(*weights), *given) for library in (losses, pml_losses))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda library: library.ThresholdReducer(low=0.1),
        lambda library: library.MultipleReducers(
            {"variance_loss1": library.AvgNonZeroReducer(), "invariance_loss": library.ThresholdReducer(high=0.3)}
        ),
    ],
)
def test_parts_are_reduced_apart_as_in_pml(make: Any) -> None:
    given = views(20, 8)
    found = answers(losses.VICRegLoss(reducer=make(reducers)), *given)
    wanted = answers(pml_losses.VICRegLoss(reducer=make(pml_reducers)), *given)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_one_view_is_compared_with_itself_as_in_pml() -> None:
    (view, _) = views(10, 4)
    torch.testing.assert_close(
        answers(losses.VICRegLoss(), view), answers(pml_losses.VICRegLoss(), view), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("batch", "dimension"), [(4096, 16), (30, 64), (40, 64)])
def test_small_covariances_keep_their_digits_in_float32(batch: int, dimension: int) -> None:
    """Off the diagonal there is little where features are independent, and it must not drown in what is on it."""
    torch.manual_seed(0)
    view = torch.randn(batch, dimension)
    if batch > dimension:
        view = torch.linalg.qr(view - view.mean(0))[0] * batch**0.5 + 1e-3 * view
    found, wanted = vicreg.off_diagonal_energy(view), vicreg.off_diagonal_energy(view.double())
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)


def test_memory_grows_with_the_smaller_of_batch_and_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(vicreg, "TILE", 64)
    multiply = Tensor.__matmul__

    def noted(a: Tensor, b: Tensor) -> Tensor:
        made.append(len(a) * b.shape[1])
        return multiply(a, b)

    monkeypatch.setattr(Tensor, "__matmul__", noted)
    for shape in ((50, 8), (8, 50), (8, 16)):
        vicreg.off_diagonal_energy(torch.ones(shape))
    assert max(made) <= 64


def test_half_precision_is_computed_in_float32() -> None:
    given = views(10, 4, torch.float16)
    found, wanted = answers(losses.VICRegLoss(), *given), answers(losses.VICRegLoss(), *(v.float() for v in given))
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(f, w.half()) for f, w in zip(found[1:], wanted[1:], strict=True))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"distance": distances.LpDistance()}, "distance"),
        ({"embedding_regularizer": regularizers.LpRegularizer()}, "embedding_regularizer"),
    ],
)
def test_a_distance_and_a_regularizer_are_refused(arguments: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"leave {name} out"):
        losses.VICRegLoss(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.arange(4)}, "takes no labels"),
        ({"ref_labels": torch.arange(4), "ref_emb": torch.ones(4, 3)}, "takes no ref_labels"),
        ({"indices_tuple": (torch.arange(2),) * 3}, "takes no indices_tuple"),
        ({"ref_emb": torch.ones(1, 3)}, r"ref_emb must be \(4, 3\) as embeddings are, got \(1, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.VICRegLoss()(torch.ones(4, 3), **arguments)


def test_a_single_embedding_has_no_variance() -> None:
    with pytest.raises(ValueError, match="at least 2 embeddings"):
        losses.VICRegLoss()(torch.ones(1, 3), ref_emb=torch.ones(1, 3))


def test_vicreg_is_built_again_from_its_arguments() -> None:
    loss = losses.VICRegLoss(1, 2, 3, 0.5, reducer=reducers.AvgNonZeroReducer())
    copy, given = loss.rebuilt(), views(10, 4)
    assert copy.spec() == loss.spec()
    assert torch.equal(copy(given[0], ref_emb=given[1]), loss(given[0], ref_emb=given[1]))
