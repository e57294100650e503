"""Logits: what a softmax over classes takes, of embeddings and the weights of the classes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradbank.distances import CosineSimilarity, Distance, DotProductSimilarity
from gradbank.losses.products import LargestProduct, Products, UnitProduct


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

    is_inverted = True

    def __init__(
        self,
        distance: Distance,
        scale: float | Tensor = 1.0,
        unit: bool = False,
        merge: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.of_each, self.unit, self.merge = distance, unit, merge
        self.scale = scale if distance.is_inverted else -scale
        self.products = Products()

    def prepare(self, embeddings: Tensor) -> Tensor:
        return embeddings

    def matrix(self, queries: Tensor, references: Tensor) -> Tensor:
        if self.merge is None:
            return self._matrix(queries, references)
        if self.merge is largest and self._is_cosine():
            return self._scaled(LargestProduct, queries, references)
        z = self._matrix(queries, references.movedim(0, 1).flatten(1).T)
        return self.merge(z.view(len(queries), len(references), references.shape[2]))

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
        number = centers.shape[2]
        vectors = self._vectors(centers.mT.flatten(0, 1))
        s = self.of_each.pairs(queries.repeat_interleave(number, 0), vectors)
        return s.view(-1, number) * self.scale

    def _matrix(self, queries: Tensor, vectors: Tensor) -> Tensor:
        if self._is_cosine():
            return self._product(queries, vectors, False)
        return self.of_each.matrix(queries, self._vectors(vectors)) * self.scale

    def _product(self, queries: Tensor, vectors: Tensor, turned: bool) -> Tensor:
        return self._scaled(UnitProduct, queries, vectors, turned)

    def _scaled(self, product: type[torch.autograd.Function], *arguments: Any) -> Tensor:
        if isinstance(self.scale, Tensor):  # which may be learned, and to a product is a number
            return self.scale * product.apply(*arguments, 1.0, self.products)  # type: ignore[no-any-return, no-untyped-call]
        return product.apply(*arguments, self.scale, self.products)  # type: ignore[no-any-return, no-untyped-call]

    def _is_cosine(self) -> bool:
        each = self.of_each
        plain = type(each) in (CosineSimilarity, DotProductSimilarity) and each.p == 2 and each.power == 1
        return plain and (self.unit or each.normalize_embeddings)

    def _vectors(self, vectors: Tensor) -> Tensor:
        return self.of_each.prepare(F.normalize(vectors, p=self.of_each.p, dim=1) if self.unit else vectors)


def largest(z: Tensor) -> Tensor:
    """The largest of each `(..., K)`."""
    return z.amax(-1)
