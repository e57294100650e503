"""Products with the directions of weights: their gradients, what is kept between sweeps, and what is never copied."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gradbank import engine, losses
from gradbank.engine import Bounds
from gradbank.engine.gradients import Gradients
from gradbank.losses.products import LargestProduct, Products, UnitProduct


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_unit_product(turned: bool, columns: bool) -> None:
    queries, weights = random(5, 3).requires_grad_(), random(*((3, 7) if columns else (7, 3)), seed=1).requires_grad_()
    vectors = weights.T if columns else weights
    wanted = 2.5 * queries @ F.normalize(vectors, dim=1).T
    found = UnitProduct.apply(queries, vectors, turned, 2.5, Products())
    found = found.T if turned else found
    upstream = random(5, 7, seed=2)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    made, expected = (torch.autograd.grad(each, [queries, weights], upstream) for each in (found, wanted))
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", [1, 3, 300])
def test_largest_product(number: int) -> None:
    queries, weights = random(5, 3).requires_grad_(), random(3, 4 * number, seed=1).requires_grad_()
    centers = weights.unflatten(1, (4, number)).movedim(0, 1)
    wanted = (2.5 * queries @ F.normalize(weights, dim=0)).unflatten(1, (4, number)).amax(2)
    found = LargestProduct.apply(queries, centers, 2.5, Products())
    upstream = random(5, 4, seed=2)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    made, expected = (torch.autograd.grad(each, [queries, weights], upstream) for each in (found, wanted))
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)


def test_a_product_is_kept_until_it_is_seen_again() -> None:
    products, queries, vectors = Products(room=40), random(5, 3), random(20, 3, seed=1)
    first, second, third = vectors[:8], vectors[8:10], vectors[10:]  # 40 numbers, 10, 50

    def product(of: Tensor) -> Tensor:
        made: Tensor = UnitProduct.apply(queries, of, False, 1.0, products)
        return made

    seen = [product(each) for each in (first, second, third)]
    assert products.room == 0, "there was room for the first alone"
    vectors.zero_()  # so that a product that is made again would be another
    assert torch.equal(product(first), seen[0])
    assert not product(first).equal(seen[0])
    assert not product(second).equal(seen[1])
    assert not products.kept


def test_a_product_that_is_differentiated_is_not_kept() -> None:
    products = Products()
    UnitProduct.apply(random(5, 3).requires_grad_(), random(4, 3), False, 1.0, products)
    LargestProduct.apply(random(5, 3), random(4, 3, 2).requires_grad_(), 1.0, products)
    assert not products.kept


def test_rows_that_nothing_is_added_to_get_zero() -> None:
    embeddings, piece = random(6, 2), random(5, 2)
    gradients = Gradients(embeddings, [piece, piece], [], (True, True, False))
    gradients.add(0, slice(1, 3), torch.ones(2, 2))
    gradients.add(0, slice(4, 5), torch.ones(1, 2))
    gradients.add(0, slice(2, 5), torch.ones(3, 2))
    gradients.add(2, slice(0, 5), torch.ones(5, 2))  # not wanted
    of_embeddings, of_piece = gradients.wanted()
    assert of_embeddings is not None
    assert of_embeddings[:, 0].tolist() == [0, 1, 2, 1, 2, 0]
    assert of_piece is not None
    assert not of_piece.any()


class Allocations(TorchDispatchMode):
    """How many numbers each operation makes that are in no memory of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in tensors((args, kwargs))}
        self.sizes += [each.numel() for each in tensors(made) if each.untyped_storage().data_ptr() not in known]
        return made


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)


@pytest.mark.parametrize(
    "name",
    [
        "ArcFaceLoss",
        "CosFaceLoss",
        "NormalizedSoftmaxLoss",
        "ProxyAnchorLoss",
        "SphereFaceLoss",
        "SubCenterArcFaceLoss",
    ],
)
def test_nothing_as_large_as_the_weights_is_made_but_their_gradient(name: str) -> None:
    torch.manual_seed(0)
    loss = getattr(losses, name)(num_classes=3000, embedding_size=64)
    (weights,) = loss.parameters()
    embeddings, labels = torch.randn(20, 64, requires_grad=True), torch.randint(3000, (20,))
    with engine.using("tiled", Bounds(tile=2**12)), Allocations() as allocations:
        loss(embeddings, labels).backward()
    assert weights.grad is not None
    assert [size for size in allocations.sizes if size >= weights.numel() // 2] == [weights.numel()]
