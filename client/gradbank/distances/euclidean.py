"""The Lp distance, and sums of differences as matrix products."""

import math
from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from gradbank.component import component
from gradbank.distances.base import Distance


@component
class LpDistance(Distance):
    """The Lp distance: `d[a, b] = (sum_k |a_k - b_k|^p)^(power / p)`.

    Raises:
        ValueError: a p below 0.
    """

    is_inverted: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if not self.p >= 0:
            raise ValueError(f"p must be at least 0, got {self.p}")

    @property
    def knows_pull(self) -> bool:
        return self.p == 2 and self.power in (1, 2) and self.computes_as(LpDistance)

    @property
    def gradient_reads_matrix(self) -> bool:
        return not (self.knows_pull and self.power == 2)

    @property
    def bounds(self) -> tuple[float, float] | None:
        return (0, 2**self.power) if self.normalize_embeddings and self.knows_pull else None

    def pull(
        self, queries: Tensor, references: Tensor, s: Tensor, weight: Tensor, of_both: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        weight, total = _over(weight, s) if self.power == 1 else (weight, None)
        of_queries, of_references = toward(queries, references, weight, self.power, True, of_both, total)
        assert of_queries is not None
        return of_queries, of_references

    def pull_of_pairs(
        self, queries: Tensor, anchor: Tensor, s: Tensor, weight: Tensor, sums: Callable[[Tensor], Tensor]
    ) -> Tensor:
        weight = weight * 2 if self.power == 2 else torch.where(s > 0, weight / s, 0)
        return queries * by_row(weight, anchor, queries) - sums(weight)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        if self.p == 2 and max(len(query_emb), len(ref_emb)) > _DIRECT_AT_MOST:
            return _Euclidean.apply(query_emb, ref_emb)  # type: ignore[no-untyped-call, no-any-return]  # torch's
        return torch.cdist(query_emb, ref_emb, p=self.p)

    def matrix(self, queries: Tensor, references: Tensor) -> Tensor:
        plain = not isinstance(self.power, Tensor) and (self.p, self.power) == (2, 2)
        if plain and max(len(queries), len(references)) > _DIRECT_AT_MOST:
            return _SquaredEuclidean.apply(queries, references)  # type: ignore[no-untyped-call, no-any-return]  # torch's
        return super().matrix(queries, references)

    def tile(self, queries: Tensor, references: Tensor, squares: Tensor | None) -> Tensor:
        known = squares is not None and self.knows_pull and not torch.is_grad_enabled()
        if not known or max(len(queries), len(references)) <= _DIRECT_AT_MOST:
            return self.matrix(queries, references)
        made = squared_distances(queries, references, squares)
        return made if self.power == 2 else made.sqrt_()

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return torch.linalg.vector_norm(query_emb - ref_emb, ord=self.p, dim=1)  # type: ignore[no-any-return]  # torch's


_DIRECT_AT_MOST = 25  # rows whose distances are sums of squared differences, exact; as torch.cdist has it


class _SquaredEuclidean(torch.autograd.Function):
    """`|a - b|^2 = |a|^2 + |b|^2 - 2 a . b`, by one matrix product each way."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return squared_distances(a, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        return toward(a, b, gradient, 2, *ctx.needs_input_grad)


class _Euclidean(torch.autograd.Function):
    """Its square root: `torch.cdist`, which copies both its arguments for each matrix."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        d = squared_distances(a, b).sqrt_()
        ctx.save_for_backward(a, b, d)
        return d

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b, d = ctx.saved_tensors
        weight, total = _over(gradient.clone(), d)
        of_a, of_b = ctx.needs_input_grad
        return toward(a, b, weight, 1, of_a, of_b, total)


def _over(weight: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """`weight / d`, written to `weight`, and its sum over each row, `(B, 1)`; 0 where a distance is 0: there is no
    direction, and the gradient is 0."""
    total = weight.div_(d).sum(1, keepdim=True)
    if d.device.type != "cpu" or not math.isfinite(total.sum()):  # else no distance is 0, and masks are slow
        total = weight.masked_fill_(d == 0, 0).sum(1, keepdim=True)
    return weight, total


def by_row(values: Tensor, row: Tensor, like: Tensor) -> Tensor:
    """`(B, 1)`: `(P,)` values added up by their row, for each of `like`."""
    return values.new_zeros(len(like)).index_add_(0, row, values)[:, None]


def squared_distances(a: Tensor, b: Tensor, of_b: Tensor | None = None) -> Tensor:
    """`(B, M)`: how long the difference of each two rows is, squared; `of_b`, `(M,)`, is how long each b is."""
    of_b = b.square().sum(1) if of_b is None else of_b
    norms = a.square().sum(1, keepdim=True) + of_b
    made: Tensor = norms.addmm_(a, b.T, alpha=-2).clamp_(min=0)
    return made


def toward(
    a: Tensor, b: Tensor, weight: Tensor, times: float, of_a: bool, of_b: bool, total: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """The weighted sums of the differences `a - b`, times `times`: over each a, and (the other way) over each b.

    Args:
        total: `(B, 1)` the sums of the rows of `weight`, if they are known.
    """
    at_a, at_b = None, None
    if of_a:
        total = weight.sum(1, keepdim=True) if total is None else total
        at_a = torch.addmm(a * total, weight, b, beta=times, alpha=-times)
    if of_b:
        at_b = torch.addmm(b * weight.sum(0)[:, None], weight.T, a, beta=times, alpha=-times)
    return at_a, at_b
