"""Products of embeddings with the directions of class weights, and their gradients."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Products:
    """What was made of tiles that were seen once, until they are seen again: an engine goes over them twice.

    A tile is known by where its queries and vectors lie in memory, which is theirs for as long as they are held here.
    So there is one of these for each evaluation of a loss, which writes to neither and takes products one way around.
    What is kept lies in a few large pieces of memory: many small ones would scatter what is freed in between.

    Args:
        room: how many numbers are kept, at most.
    """

    def __init__(self, room: int = 2**25) -> None:
        self.room = room
        self.kept: dict[tuple[int, ...], list[_Place]] = {}
        self.held: dict[int, Tensor] = {}
        self.pieces: list[Tensor] = []
        self.current: dict[torch.dtype, tuple[int, int]] = {}  # the piece in use, and how much of it is

    def keep(self, queries: Tensor, vectors: Tensor, *made: Tensor) -> None:
        """Keeps what was made of a tile, if there is room."""
        if made[0].numel() <= self.room:
            self.room -= made[0].numel()
            for each in (queries, vectors):
                self.held.setdefault(each.untyped_storage().data_ptr(), each.detach())
            self.kept[_key(queries, vectors)] = [self._put(each) for each in made]

    def take(self, queries: Tensor, vectors: Tensor) -> list[Tensor] | None:
        """What was made of a tile, which is then forgotten; None if it was not kept."""
        places = self.kept.pop(_key(queries, vectors), None)
        if places is None:
            return None
        return [self.pieces[place.piece][place.start :][: math.prod(place.shape)].view(place.shape) for place in places]

    def _put(self, made: Tensor) -> "_Place":
        number = made.numel()
        piece, start = self.current.get(made.dtype, (-1, 0))
        if piece < 0 or start + number > len(self.pieces[piece]):
            piece, start = len(self.pieces), 0
            self.pieces.append(made.new_empty(max(number, min(16 * number, 2**23))))
        self.pieces[piece][start : start + number] = made.reshape(-1)
        self.current[made.dtype] = piece, start + number
        return _Place(piece, start, tuple(made.shape))


class _Place(NamedTuple):
    piece: int
    start: int
    shape: tuple[int, ...]


def _key(queries: Tensor, vectors: Tensor) -> tuple[int, ...]:
    return queries.data_ptr(), *queries.shape, vectors.data_ptr(), *vectors.shape, *vectors.stride()


class UnitProduct(torch.autograd.Function):
    """`scale * queries @ F.normalize(vectors).T`: `(B, M)`, or its transpose if `turned`.

    The norms are divided out of the product, which is smaller than the vectors.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, vectors: Tensor, turned: bool, scale: float, products: Products) -> Tensor:
        known = products.take(queries, vectors)
        if known is None:
            inverse = _inverse_norms(vectors)
            z = vectors @ queries.T if turned else queries @ vectors.T
            z.mul_(_along(inverse * scale, turned))
            if not any(ctx.needs_input_grad):  # else it is seen only once
                products.keep(queries, vectors, z, inverse)
        else:
            z, inverse = known
        ctx.scale, ctx.turned = scale, turned
        ctx.save_for_backward(queries, vectors, inverse)
        return z

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        queries, vectors, inverse = ctx.saved_tensors
        of_product = gradient * _along(inverse * ctx.scale, ctx.turned)
        of_product = of_product.T if ctx.turned else of_product
        of_queries = of_product @ vectors if ctx.needs_input_grad[0] else None
        of_vectors = _of_vectors(of_product, queries, vectors, inverse) if ctx.needs_input_grad[1] else None
        return of_queries, of_vectors, None, None, None


class LargestProduct(torch.autograd.Function):
    """The largest of `UnitProduct` with each of K centers: `(B, M)`, of `(M, D, K)`; the first among equals counts."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, centers: Tensor, scale: float, products: Products) -> Tensor:
        known = products.take(queries, centers)
        if known is None:
            vectors = _vectors(centers)
            inverse = _inverse_norms(vectors)
            number = centers.shape[2]
            z = (queries @ vectors.T).mul_(inverse * scale).view(len(queries), len(centers), number)
            best, kind = z[..., 0].clone(), torch.uint8 if number <= 256 else torch.int32
            which = torch.zeros_like(best, dtype=kind)
            for k in range(1, number):  # few, and reductions over a short last dimension are slow
                which = torch.maximum(which, (z[..., k] > best).to(kind).mul_(k))
                best = torch.maximum(best, z[..., k])
            if not any(ctx.needs_input_grad):
                products.keep(queries, centers, best, which, inverse)
        else:
            best, which, inverse = known
        ctx.scale = scale
        ctx.save_for_backward(queries, centers, inverse, which)
        return best

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        queries, centers, inverse, which = ctx.saved_tensors
        vectors, number = _vectors(centers), centers.shape[2]
        of_each, which = gradient.new_empty(*gradient.shape, number), which.to(gradient.dtype)
        chosen = torch.empty_like(which)
        for k in range(number):
            of_each[..., k] = torch.eq(which, k, out=chosen).mul_(gradient)
        of_product = of_each.flatten(1).mul_(inverse * ctx.scale)
        of_queries = of_product @ vectors if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_queries, None, None, None
        of_vectors = _of_vectors(of_product, queries, vectors, inverse)
        return of_queries, by_class(of_vectors.T, number), None, None


def by_class(columns: Tensor, centers: int) -> Tensor:
    """`(D, M * K)` centers as `(M, D, K)`, a view."""
    return columns.reshape(len(columns), -1, centers).movedim(0, 1)


def _vectors(centers: Tensor) -> Tensor:
    """`(M, D, K)` centers as `(M * K, D)`: a view of what is laid out as `(D, M, K)`."""
    return centers.movedim(0, 1).flatten(1).T


def _inverse_norms(vectors: Tensor) -> Tensor:
    return vectors.T.square().sum(0).sqrt_().clamp_(min=1e-12).reciprocal_()


def _along(values: Tensor, turned: bool) -> Tensor:
    return values[:, None] if turned else values


def _of_vectors(of_product: Tensor, queries: Tensor, vectors: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of `(M, D)` vectors, in their layout: that of their `(B, M)` product, which was divided by norms."""
    by_column = vectors.stride(0) < vectors.stride(1)
    made = (queries.T @ of_product).T if by_column else of_product.T @ queries
    radial = (made * vectors).sum(1).mul_(inverse.square())
    return made.addcmul_(vectors, radial[:, None], value=-1)
