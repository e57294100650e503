"""Thresholds: where each value falls among its anchor's, exactly, and the float at which a loss stops counting."""

from collections.abc import Callable

import torch
from torch import Tensor

_CELLS = 1024  # of the grid that says roughly where a value falls
_STEPS = 6  # at most, from there to where it falls exactly; beyond, bisection is quicker


class Buckets:
    """Each of `b` anchors' thresholds in ascending order, and which two of them a value lies between.

    Bisection is slow, so a grid over each anchor's thresholds first says how many lie in lower cells than the value:
    those in its own cell, few, are then compared with. What the grid rounds it rounds alike for values and
    thresholds, so the answer is exact.

    Args:
        anchor: `(Q,)` whose threshold each one is.
        thresholds: `(Q,)`, finite.
    """

    def __init__(self, anchors: int, anchor: Tensor, thresholds: Tensor) -> None:
        by_anchor = anchor.argsort(stable=True)
        number = torch.bincount(anchor, minlength=anchors)
        start = number.cumsum(0) - number
        column = torch.empty_like(anchor)
        column[by_anchor] = torch.arange(len(anchor), device=anchor.device) - start[anchor[by_anchor]]
        most = int(number.max()) if len(anchor) else 0
        # filled up with +inf, and one column more: every value is below that
        table = thresholds.new_full((anchors, most + 1), torch.inf)
        table[anchor, column] = thresholds
        self.table, order = table.sort(dim=1)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, places)
        self.anchor, self.rank, self.size = anchor, rank[anchor, column], most + 1
        self._make_grid()

    def _make_grid(self) -> None:
        finite = self.table.isfinite()
        low = self.table.amin(1, keepdim=True)
        low = torch.where(low.isfinite(), low, 0)
        high = torch.where(finite, self.table, low).amax(1, keepdim=True)
        self.low, self.scale = low, _CELLS / (high - low).clamp(min=torch.finfo(low.dtype).tiny)
        self.scale = self.scale.clamp(max=torch.finfo(low.dtype).max)
        cell = torch.where(finite, self._cell(torch.where(finite, self.table, 0)), _CELLS + 1)
        in_cell = cell.new_zeros(len(cell), _CELLS + 2).scatter_add_(1, cell, finite.long())
        self.below = in_cell.cumsum(1) - in_cell
        self.steps = int(in_cell.max()) if in_cell.numel() else 0

    def _cell(self, values: Tensor) -> Tensor:
        return (values - self.low).mul_(self.scale).clamp_(-1, _CELLS).add_(1).long()

    def of(self, values: Tensor) -> Tensor:
        """`(b, w)`: how many of its anchor's thresholds each value is not below."""
        if self.steps > _STEPS:
            return torch.searchsorted(self.table, values, right=True)
        bucket = self.below.gather(1, self._cell(values))
        for _ in range(self.steps):
            bucket += self.table.gather(1, bucket) <= values
        return bucket

    def at_or_above(self, weights: Tensor) -> Tensor:
        """`(b, buckets)`: the `(Q,)` weights of the thresholds that the values of each bucket are below, added up."""
        by_rank = weights.new_zeros(self.table.shape).index_put_((self.anchor, self.rank), weights, accumulate=True)
        return by_rank.flip(1).cumsum(1).flip(1)

    def below_each(self, counts: Tensor) -> Tensor:
        """`(Q,)`: how many values are below each threshold, given how many, `(b, buckets)`, are in each bucket."""
        return counts.cumsum(1)[self.anchor, self.rank]


def first_not_above(
    value: Callable[[Tensor], Tensor], guess: Tensor, slack: Tensor, bound: float, strict: bool
) -> Tensor:
    """The smallest `t` for which the decreasing `value(t)` no longer exceeds `bound`, exact in floating point.

    So a value is below `t` just when the plain, rounded expression says that the triplet counts. The floats between
    `guess - slack` and `guess + slack`, which must have `t` among them, are bisected in their order: near 0 there are
    many more of them than roundings.

    Args:
        strict: "exceeds" is `>`; it is `>=` otherwise.
    """
    whole = torch.int64 if guess.dtype == torch.float64 else torch.int32
    lowest = torch.iinfo(whole).min

    def place(x: Tensor) -> Tensor:
        """The floats, numbered in their order."""
        bits = x.view(whole).long()
        return torch.where(bits < 0, lowest - bits, bits)

    def number(at: Tensor) -> Tensor:
        return torch.where(at < 0, lowest - at, at).to(whole).view(guess.dtype)

    low, high = place(guess - slack), place(guess + slack)
    while bool((low + 1 < high).any()):
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        made = value(number(middle))
        over = made > bound if strict else made >= bound
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return number(high)
