"""Similarities: products of embeddings, of which the larger is the closer."""

from collections.abc import Callable
from dataclasses import field

from torch import Tensor

from gradbank.component import component, foundation
from gradbank.distances.base import Distance


@foundation
class Product(Distance):
    """`s[a, b] = a . b` of prepared embeddings, by one matrix product: larger is closer."""

    is_inverted: bool = field(default=True, init=False)

    @property
    def is_product(self) -> bool:
        return self.power == 1 and self.computes_as(Product)

    @property
    def knows_pull(self) -> bool:
        return self.is_product

    @property
    def bounds(self) -> tuple[float, float] | None:
        return (-1, 1) if self.normalize_embeddings and self.p == 2 and self.is_product else None

    def pull(
        self, queries: Tensor, references: Tensor, s: Tensor, weight: Tensor, of_both: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return weight @ references, weight.mT @ queries if of_both else None

    def pull_of_pairs(
        self, queries: Tensor, anchor: Tensor, s: Tensor, weight: Tensor, sums: Callable[[Tensor], Tensor]
    ) -> Tensor:
        return sums(weight)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return query_emb @ ref_emb.mT

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return (query_emb * ref_emb).sum(1)


@component
class CosineSimilarity(Product):
    """`s[a, b] = a . b / (|a| |b|)`: larger is closer, 1 at most. It always normalises."""

    normalize_embeddings: bool = field(default=True, init=False)


@component
class DotProductSimilarity(Product):
    """`s[a, b] = a . b`: larger is closer. Like its namesake it normalises unless told not to."""
