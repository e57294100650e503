"""Logits: what a softmax over classes takes, of embeddings and the weights of the classes."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gradbank.distances import CosineSimilarity, Distance, DotProductSimilarity


class Logits(Distance):
    """Distances from embeddings, prepared already, to the weights of classes, as logits: larger is closer.

    Weights are many and wide, so what a tile of them costs is felt: normalising is left to the product where it can
    be, products are kept for a second look, and no layout of the weights is copied into another.

    Args:
        distance: between an embedding and a vector.
        scale: what a similarity is multiplied by; a distance changes sign too.
        unit: whether vectors are normalised even where `distance` does not.
        merge: makes one logit of a class's `(..., K)`; then its weights are `(D, K)`, K centers.
    """

    is_inverted: ClassVar[bool] = True

    def __init__(
        self,
        distance: Distance,
        scale: float = 1.0,
        unit: bool = False,
        merge: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.of_each, self.unit, self.merge = distance, unit, merge
        self.scale = scale if distance.is_inverted else -scale
        self.products = _Products()

    def prepare(self, embeddings: Tensor) -> Tensor:
        return embeddings

    def matrix(self, queries: Tensor, references: Tensor) -> Tensor:
        if self.merge is None:
            return self._matrix(queries, references)
        classes, dimension, centers = references.shape
        s = self._matrix(queries, references.movedim(0, 1).reshape(dimension, classes * centers).T)
        return self.merge(s.view(len(queries), classes, centers))

    def turned(self, vectors: Tensor, queries: Tensor) -> Tensor:
        """The `(M, B)` transpose of `matrix`, in that order in memory."""
        if self._is_cosine():
            return self._product(queries, vectors, True)
        return self._matrix(queries, vectors).T.contiguous()

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        s = self.to_each(queries, references.unsqueeze(2) if self.merge is None else references)
        return s.squeeze(1) if self.merge is None else self.merge(s)

    def to_each(self, queries: Tensor, centers: Tensor) -> Tensor:
        """Prepared `(P, D)` queries, each with the `(D, K)` centers of its own row: `(P, K)`."""
        centers = centers.mT
        vectors = self._vectors(centers.flatten(0, 1)).view(centers.shape)
        return self.of_each.matrix(queries.unsqueeze(1), vectors).squeeze(1) * self.scale

    def _matrix(self, queries: Tensor, vectors: Tensor) -> Tensor:
        if self._is_cosine():
            return self._product(queries, vectors, False)
        return self.of_each.matrix(queries, self._vectors(vectors)) * self.scale

    def _product(self, queries: Tensor, vectors: Tensor, turned: bool) -> Tensor:
        made: Tensor = _UnitProduct.apply(  # type: ignore[no-untyped-call]
            queries, vectors, self.scale, turned, self.products
        )
        return made

    def _is_cosine(self) -> bool:
        each = self.of_each
        plain = type(each) in (CosineSimilarity, DotProductSimilarity) and each.p == 2 and each.power == 1
        return plain and (self.unit or each.normalize_embeddings)

    def _vectors(self, vectors: Tensor) -> Tensor:
        return self.of_each.prepare(F.normalize(vectors, p=self.of_each.p, dim=1) if self.unit else vectors)


class _Products:
    """Products of tiles that were seen once, until they are seen again: an engine goes over them twice.

    A tile is known by where its queries and vectors lie in memory, which is theirs for as long as they are held here.

    Args:
        room: how many numbers are kept, at most.
    """

    def __init__(self, room: int = 2**25) -> None:
        self.room = room
        self.kept: dict[tuple[int, ...], tuple[Tensor, ...]] = {}

    def keep(self, queries: Tensor, vectors: Tensor, *made: Tensor) -> None:
        if made[0].numel() <= self.room:
            self.room -= made[0].numel()
            self.kept[self._key(queries, vectors)] = (*made, queries.detach(), vectors.detach())

    def take(self, queries: Tensor, vectors: Tensor) -> tuple[Tensor, ...] | None:
        found = self.kept.pop(self._key(queries, vectors), None)
        return None if found is None else found[:2]

    def _key(self, queries: Tensor, vectors: Tensor) -> tuple[int, ...]:
        return queries.data_ptr(), len(queries), vectors.data_ptr(), len(vectors)


class _UnitProduct(torch.autograd.Function):
    """`scale * queries @ F.normalize(vectors).T`, or its transpose if `turned`.

    The norms are divided out of the product, which is smaller than the vectors.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, vectors: Tensor, scale: float, turned: bool, products: _Products) -> Tensor:
        known = products.take(queries, vectors)
        if known is None:
            inverse = vectors.T.square().sum(0).sqrt_().clamp_(min=1e-12).reciprocal_()
            s = vectors @ queries.T if turned else queries @ vectors.T
            s.mul_(_along(inverse * scale, turned))
            products.keep(queries, vectors, s, inverse)
        else:
            s, inverse = known
        ctx.scale, ctx.turned = scale, turned
        ctx.save_for_backward(queries, vectors, inverse, s)
        return s

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        queries, vectors, inverse, s = ctx.saved_tensors
        of_product = gradient * _along(inverse * ctx.scale, ctx.turned)
        of_product = of_product.T if ctx.turned else of_product
        of_queries = of_product @ vectors if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_queries, None, None, None, None
        # in the layout of the vectors, which may be columns
        by_column = vectors.stride(0) < vectors.stride(1)
        of_vectors = (queries.T @ of_product).T if by_column else of_product.T @ queries
        radial = (gradient * s).sum(1 if ctx.turned else 0).mul_(inverse.square())
        return of_queries, of_vectors.addcmul_(vectors, radial[:, None], value=-1), None, None, None


def _along(values: Tensor, turned: bool) -> Tensor:
    return values[:, None] if turned else values
