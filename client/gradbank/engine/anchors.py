"""What a block of anchors knows when its loss is written: its positives, and statistics of its negatives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradbank.reducers import Ratio


class Gathered(NamedTuple):
    """A statistic of the negatives, one entry per anchor (or per question that was asked)."""

    value: Tensor  # differentiable
    number: Tensor | None = None  # a constant: how many negatives the value is made of

    def ratio(self) -> Ratio:
        """The sum over the number, over all anchors."""
        assert self.number is not None
        return Ratio(self.value.sum(dtype=torch.float64), self.number.sum(dtype=torch.float64))


class Positives(NamedTuple):
    """The positive pairs of a block of anchors, one entry each."""

    s: Tensor  # (P,) distance or similarity
    anchor: Tensor  # (P,) int64: the pair's anchor, 0 .. anchors - 1
    times: Tensor  # (P,) how often the pair counts


@dataclass(frozen=True)
class Anchors:
    """A block of `b` anchors with `P` positive pairs.

    Attributes:
        size: b.
        positives: the pairs themselves; losses of pairs are written on `positives.s`.
        found: the statistics that the loss asked for, by the names it gave them.
        weight: `(b,)` what each anchor's loss is multiplied by, or None.
    """

    size: int
    positives: Positives
    found: Mapping[str, Gathered]
    weight: Tensor | None = None

    def each(self, values: Tensor) -> Tensor:
        """`(b,)` values of the anchors, given to each of their positives: `(P,)`."""
        return values[self.positives.anchor]

    def sum(self, values: Tensor) -> Tensor:
        """`(P,)` values of the positives, added up by anchor: `(b,)`."""
        return values.new_zeros(self.size).index_add(0, self.positives.anchor, values)

    def logsumexp(self, values: Tensor) -> Tensor:
        """`(P,)` values of the positives, log-sum-exp by anchor: `(b,)`, -inf where there are none."""
        most = values.new_full((self.size,), -torch.inf)
        most = most.scatter_reduce(0, self.positives.anchor, values.detach(), "amax")
        some = most > -torch.inf
        most = torch.where(some, most, 0)
        total = self.sum((values - self.each(most)).exp())
        return torch.where(some, most + torch.where(some, total, 1).log(), -torch.inf)
