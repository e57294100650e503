"""The Lp distance, and sums of differences as matrix products."""

from typing import Any

import torch
from torch import Tensor

from gradbank.component import component
from gradbank.distances.base import Distance


@component
class LpDistance(Distance):
    """The Lp distance: `d[a, b] = (sum_k |a_k - b_k|^p)^(power / p)`."""

    @property
    def knows_pull(self) -> bool:
        return self.p == 2 and self.power in (1, 2) and self.computes_as(LpDistance)

    @property
    def gradient_reads_matrix(self) -> bool:
        return not (self.knows_pull and self.power == 2)

    def pull(
        self, queries: Tensor, references: Tensor, s: Tensor, weight: Tensor, of_both: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if self.power == 1:
            weight = _over(weight, s)
        of_queries, of_references = toward(queries, references, weight, self.power, True, of_both)
        assert of_queries is not None
        return of_queries, of_references

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        if self.p == 2 and max(len(query_emb), len(ref_emb)) > _DIRECT_AT_MOST:
            made: Tensor = _Euclidean.apply(query_emb, ref_emb)  # type: ignore[no-untyped-call]
            return made
        return torch.cdist(query_emb, ref_emb, p=self.p)

    def matrix(self, queries: Tensor, references: Tensor) -> Tensor:
        if (self.p, self.power) == (2, 2) and max(len(queries), len(references)) > _DIRECT_AT_MOST:
            made: Tensor = _SquaredEuclidean.apply(queries, references)  # type: ignore[no-untyped-call]
            return made
        return super().matrix(queries, references)

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        return self.raised(torch.linalg.vector_norm(queries - references, ord=self.p, dim=1))


_DIRECT_AT_MOST = 25  # rows whose distances are sums of squared differences, exact; as torch.cdist has it


class _SquaredEuclidean(torch.autograd.Function):
    """`|a - b|^2 = |a|^2 + |b|^2 - 2 a . b`, by one matrix product each way."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return squares(a, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        return toward(a, b, gradient, 2, *ctx.needs_input_grad)


class _Euclidean(torch.autograd.Function):
    """Its square root: `torch.cdist`, which copies both its arguments for each matrix."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        d = squares(a, b).sqrt_()
        ctx.save_for_backward(a, b, d)
        return d

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b, d = ctx.saved_tensors
        return toward(a, b, _over(gradient.clone(), d), 1, *ctx.needs_input_grad)


def _over(weight: Tensor, d: Tensor) -> Tensor:
    """`weight / d`, written to `weight`; 0 where a distance is 0: there is no direction, and the gradient is 0."""
    if d.device.type != "cpu" or not d.numel() or not d.amin() > 0:
        weight.mul_(d.sign())
        d = d.clamp(min=torch.finfo(d.dtype).tiny)
    return weight.div_(d)


def squares(a: Tensor, b: Tensor) -> Tensor:
    """`(B, M)`: how long the difference of each two rows is, squared."""
    norms = a.square().sum(1, keepdim=True) + b.square().sum(1)
    return norms.addmm_(a, b.T, alpha=-2).clamp_(min=0)


def toward(
    a: Tensor, b: Tensor, weight: Tensor, times: float, of_a: bool, of_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The weighted sums of the differences `a - b`, times `times`: over each a, and (the other way) over each b."""
    return (
        torch.addmm(a * weight.sum(1, keepdim=True), weight, b, alpha=-1).mul_(times) if of_a else None,
        torch.addmm(b * weight.sum(0)[:, None], weight.T, a, alpha=-1).mul_(times) if of_b else None,
    )
