"""The noise-to-signal ratio."""

from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from gradbank.component import component
from gradbank.distances.base import Distance
from gradbank.distances.euclidean import by_row, squared_distances, toward

_ROUNDINGS = 128  # of a product of rows of length 1, more than there are
_EQUAL_AT_MOST = 2**18  # pairs that are looked at: of embeddings that have collapsed all are
_AT_ONCE = 2**13  # of which so many are held


@component
class SNRDistance(Distance):
    """The noise-to-signal ratio: `d[a, b] = Var(a - b) / Var(a)`, each over the D numbers of an embedding.

    It is not symmetric: the anchor is the signal.

    Yuan et al., "Signal-to-Noise Ratio: A Robust Distance Metric for Deep Metric Learning", CVPR 2019.
    """

    is_inverted: bool = field(default=False, init=False)

    def normalized(self, embeddings: Tensor, inverse: Tensor | None) -> Tensor:
        """`(N, D)` embeddings as `matrix` wants them: normalised, unless told not to, and less their mean."""
        return _centered(super().normalized(embeddings, inverse))

    def _measured(self, embeddings: Tensor) -> Tensor:
        return self.maybe_normalize(embeddings)  # a mean that is taken off is not part of a norm

    @property
    def knows_pull(self) -> bool:
        return self.power == 1 and self.computes_as(SNRDistance)

    def pull(
        self, queries: Tensor, references: Tensor, s: Tensor, weight: Tensor, of_both: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        inverse = _inverse_signal(queries)
        of_queries, of_references = _toward_signal(queries, references, inverse, s, weight, True, of_both)
        assert of_queries is not None
        return of_queries, of_references

    def pull_of_pairs(
        self, queries: Tensor, anchor: Tensor, s: Tensor, weight: Tensor, sums: Callable[[Tensor], Tensor]
    ) -> Tensor:
        inverse = queries.square().sum(1, keepdim=True).mul_(0.5).reciprocal_()
        own = by_row(torch.where(weight == 0, 0, weight * (1 - s)), anchor, queries)
        if bool(inverse.isinf().any()):
            used = torch.zeros_like(inverse, dtype=torch.bool)
            used[anchor[weight != 0]] = True
            inverse = inverse.masked_fill(~used, 0)
        pulled: Tensor = (queries * own - _centered(sums(weight))) * inverse
        return pulled

    def matrix(self, queries: Tensor, references: Tensor) -> Tensor:
        made: Tensor = _NoiseToSignal.apply(queries, references)  # type: ignore[no-untyped-call]
        return self.raised(made)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        made: Tensor = _NoiseToSignal.apply(_centered(query_emb), _centered(ref_emb))  # type: ignore[no-untyped-call]
        return made

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        return self.raised((queries - references).square().sum(1) / queries.square().sum(1))

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        noise, signal = _centered(query_emb - ref_emb), _centered(query_emb)
        return noise.square().sum(1) / signal.square().sum(1)


def _centered(rows: Tensor) -> Tensor:
    return rows - rows.mean(1, keepdim=True)


def _inverse_signal(a: Tensor) -> Tensor:
    return a.square().sum(1, keepdim=True).reciprocal()


def _measure_equal_rows(s: Tensor, a: Tensor, b: Tensor) -> None:
    """Corrects what is 0 but for the rounding of the product: a reducer may count whatever is above 0."""
    near = s <= _ROUNDINGS * torch.finfo(s.dtype).eps
    if int(near.count_nonzero()) > _EQUAL_AT_MOST:
        return
    for some in torch.split(near.nonzero(), _AT_ONCE):
        row, column = some.unbind(1)
        signal = a[row]
        s[row, column] = (signal - b[column]).square_().sum(1) / signal.square().sum(1)


class _NoiseToSignal(torch.autograd.Function):
    """`|a - b|^2 / |a|^2` of centered rows: from one matrix product each way, so that nothing of B * M * D is made."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        s = squared_distances(a, b).mul_(_inverse_signal(a))
        _measure_equal_rows(s, a, b)
        ctx.save_for_backward(a, b, s)
        return s

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b, s = ctx.saved_tensors
        of_a, of_b = ctx.needs_input_grad
        return _toward_signal(a, b, _inverse_signal(a), s, gradient, of_a, of_b)


def _toward_signal(
    a: Tensor, b: Tensor, inverse: Tensor, s: Tensor, weight: Tensor, of_a: bool, of_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of `(weight * s).sum()`: at each a, of the numerator and of the denominator, and at each b."""
    at_a, at_b = None, None
    if bool(inverse.isinf().any()):  # a row without a signal, of which nothing may be asked
        unused = ~weight.any(1, keepdim=True)
        inverse, s = inverse.masked_fill(unused, 0), s.masked_fill(unused, 0)
    if of_a:
        at_a, _ = toward(a, b, weight, 2, True, False)
        assert at_a is not None
        at_a.addcmul_(a, (weight * s).sum(1, keepdim=True), value=-2).mul_(inverse)
    if of_b:
        _, at_b = toward(a, b, weight * inverse, 2, False, True)
    return at_a, at_b
