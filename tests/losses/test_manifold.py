"""ManifoldLoss: PML's value and gradients, without a tensor of proxies x embeddings x nodes."""

import math
from typing import Any

import pytest
import torch
from pytorch_metric_learning import distances as pml_distances
from pytorch_metric_learning import losses as pml_losses
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradbank import distances, losses

D, PROXIES = 6, 4


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """PML inverts in float32, whatever the batch; here it does in float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def both(**arguments: Any) -> tuple[nn.Module, nn.Module]:
    """The loss here and PML's, with the same proxies."""
    made = []
    for library in (losses, pml_losses):
        torch.manual_seed(0)
        made.append(library.ManifoldLoss(D, PROXIES, **arguments).double())
    return made[0], made[1]


def batch_of(size: int) -> Tensor:
    return torch.randn(size, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def answers(loss: Any, embeddings: Tensor, own: Tensor | None = None, seed: int = 2) -> list[Tensor]:
    """The value, and the gradients of embeddings and proxies."""
    leaf = embeddings.clone().requires_grad_()
    loss.zero_grad()
    torch.manual_seed(seed)
    value = loss(leaf, indices_tuple=own).squeeze()
    value.backward()
    return [value.detach(), leaf.grad, loss.proxies.grad.clone()]


def test_both_draw_the_same_proxies() -> None:
    ours, theirs = both()
    assert torch.equal(ours.proxies, theirs.proxies)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "arguments", [{}, {"lambdaC": 0}, {"lambdaC": 3.5, "alpha": 0.99}, {"margin": 0.0}, {"margin": 0.3, "alpha": 0.3}]
)
@pytest.mark.parametrize("size", [4, 5, 30])
def test_one_seed_gives_the_loss_of_pml(arguments: Any, size: int) -> None:
    ours, theirs = both(**arguments)
    for seed in range(3):
        found, wanted = (answers(loss, batch_of(size), seed=seed) for loss in (ours, theirs))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("exact")
def test_chosen_proxies_give_the_loss_of_pml() -> None:
    ours, theirs = both()
    own = torch.tensor([3, 3, 0])  # fewer embeddings than proxies
    torch.testing.assert_close(
        answers(ours, batch_of(3), own), answers(theirs, batch_of(3), own), rtol=1e-9, atol=1e-12
    )
    assert torch.equal(ours(batch_of(3), indices_tuple=(own,)), ours(batch_of(3), indices_tuple=own))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["DotProductSimilarity", "LpDistance"])
def test_another_distance_gives_the_loss_of_pml(name: str) -> None:
    ours, theirs = both()
    ours.distance, theirs.distance = getattr(distances, name)(), getattr(pml_distances, name)()
    torch.testing.assert_close(answers(ours, batch_of(9)), answers(theirs, batch_of(9)), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("exact")
def test_an_infinite_lambda_leaves_the_context_loss() -> None:
    """PML multiplies by it, and is infinite."""
    found = answers(both(lambdaC=math.inf)[0], batch_of(12))
    with_both, without = (answers(both(lambdaC=weight)[1], batch_of(12)) for weight in (1, 0))
    wanted = [a - b for a, b in zip(with_both, without, strict=True)]
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-11)
    assert bool(answers(both(lambdaC=math.inf)[1], batch_of(12))[0].isinf())


def test_nothing_is_larger_than_the_matrix_of_all_nodes() -> None:
    class Largest(TorchDispatchMode):
        entries = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for each in made if isinstance(made, tuple | list) else (made,):
                if isinstance(each, Tensor):
                    self.entries = max(self.entries, each.numel())
            return made

    ours, _ = both()
    with Largest() as seen:
        answers(ours, batch_of(30))
    assert 0 < seen.entries <= (30 + PROXIES) ** 2


def test_an_empty_batch_costs_nothing() -> None:
    ours, _ = both()
    leaf = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    value = ours(leaf, indices_tuple=torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert float(value.detach()) == 0
    assert leaf.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lambdaC": -1}, "must not be negative, got -1"),
        ({"alpha": 1.0}, r"between 0 and 1, got 1\.0"),
        ({"alpha": 0}, "between 0 and 1, got 0"),
        ({"K": 0}, "K must be a whole number, at least 1"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.ManifoldLoss(D, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.arange(5)}, "takes no labels"),
        ({"ref_emb": torch.ones(5, D)}, "takes no ref_emb"),
        ({"indices_tuple": torch.arange(4)}, r"must be \(5,\) integers, .*got \(4,\)"),
        ({"indices_tuple": torch.ones(5)}, "torch.float32"),
        ({"indices_tuple": torch.arange(5)}, r"0\.\.3 \(K=4\), got 0\.\.4"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.ManifoldLoss(D, PROXIES)(torch.ones(5, D), **arguments)


def test_too_few_embeddings_to_draw_proxies_for_are_refused() -> None:
    with pytest.raises(ValueError, match="K=4 proxies at least once, and got 3 embeddings"):
        losses.ManifoldLoss(D, PROXIES)(torch.ones(3, D))


@pytest.mark.parametrize("error", [ValueError, AssertionError])  # PML asserts it
def test_another_dimension_is_refused(error: type[Exception]) -> None:
    with pytest.raises(error, match="have dimension 5, but ManifoldLoss was built with l=6"):
        losses.ManifoldLoss(D)(torch.ones(3, 5))


def test_what_is_not_a_number_is_not_hidden() -> None:
    embeddings = torch.randn(12, 8)
    embeddings[2, 3] = torch.nan
    assert losses.ManifoldLoss(8, K=4)(embeddings).isnan()
