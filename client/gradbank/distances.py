"""Distances and similarities between embeddings: `(B, D)` and `(M, D)` give `(B, M)`."""

from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gradbank.component import Component, component, foundation


@foundation
class Distance(Component):
    """How far apart two embeddings are.

    A *similarity* is an inverted distance: larger is closer. Losses never ask which they hold: they ask
    `margin` for a signed difference and `closeness` for a matrix in which larger is closer.

    A distance of your own overrides `compute_mat`; every engine then works with it.

    Args:
        normalize_embeddings: divide each embedding by its `p`-norm first.
        p: the norm, for normalising and (in `LpDistance`) for the distance itself.
        power: the exponent put on every entry of the matrix.
    """

    normalize_embeddings: bool = True
    p: float = 2
    power: float = 1

    is_inverted: ClassVar[bool] = False

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        """The `(B, M)` matrix between `(B, D)` queries and `(M, D)` references (themselves if None).

        Raises:
            ValueError: an input that is not two-dimensional, or dimensions that differ.
        """
        self.check_shapes(query_emb, ref_emb)
        queries = self.prepare(query_emb)
        return self.matrix(queries, queries if ref_emb is None else self.prepare(ref_emb))

    def prepare(self, embeddings: Tensor) -> Tensor:
        """`(N, D)` embeddings as `matrix` wants them: normalised, unless told not to."""
        return F.normalize(embeddings, p=self.p, dim=1) if self.normalize_embeddings else embeddings

    def matrix(self, queries: Tensor, references: Tensor) -> Tensor:
        """The `(B, M)` matrix between prepared embeddings."""
        mat = self.compute_mat(queries, references)
        return mat if self.power == 1 else mat**self.power

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        """Prepared `(P, D)` queries, each with the reference of its own row: `(P,)`."""
        return self.matrix(queries.unsqueeze(1), references.unsqueeze(1)).view(len(queries))

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """The `(B, M)` matrix before `power`: the one method that a distance must write.

        Both arguments may have equal leading dimensions, `(..., B, D)` and `(..., M, D)`: transpose with `.mT`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define compute_mat")

    def margin(self, x: "Tensor | float", y: "Tensor | float") -> Tensor:
        """How much farther `x` is than `y`: positive when it is."""
        return y - x if self.is_inverted else x - y  # type: ignore[return-value]

    def closeness(self, mat: Tensor) -> Tensor:
        """`mat` with larger meaning closer."""
        return mat if self.is_inverted else -mat

    def check_shapes(self, query_emb: Tensor, ref_emb: Tensor | None) -> None:
        """Refuses, by ValueError, inputs that are not two-dimensional or differ in dimension."""
        for name, rows in (("embeddings", query_emb), ("ref_emb", ref_emb)):
            if rows is not None and rows.ndim != 2:
                raise ValueError(f"{name} must be (rows, dimension), got shape {tuple(rows.shape)}")
        if ref_emb is not None and ref_emb.shape[1] != query_emb.shape[1]:
            raise ValueError(
                f"embeddings and ref_emb must have the same dimension, got {query_emb.shape[1]} and {ref_emb.shape[1]}"
            )


@component
class LpDistance(Distance):
    """The Lp distance: `d[a, b] = (sum_k |a_k - b_k|^p)^(power / p)`."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return torch.cdist(query_emb, ref_emb, p=self.p)


@component
class CosineSimilarity(Distance):
    """`s[a, b] = a . b / (|a| |b|)`: larger is closer, 1 at most. It always normalises."""

    normalize_embeddings: bool = field(default=True, init=False)
    is_inverted: ClassVar[bool] = True

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return query_emb @ ref_emb.mT


@component
class DotProductSimilarity(Distance):
    """`s[a, b] = a . b`: larger is closer. Like its namesake it normalises unless told not to."""

    is_inverted: ClassVar[bool] = True

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return query_emb @ ref_emb.mT
