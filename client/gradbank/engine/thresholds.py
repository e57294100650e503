"""Thresholds: where each value falls among its anchor's, exactly, and the float at which a loss stops counting."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_CELLS = 1024  # of the grid that says roughly where a value falls, for each anchor
_STEPS = 24  # thresholds of one cell, at most; where more lie so close together, bisection is quicker


class Found(NamedTuple):
    """Where the values of a tile fall."""

    cell: Tensor  # (b, w) int64: the cell of each, of all anchors' cells
    crowded: Tensor  # (n,) int64: which values, flattened, share their cell with a threshold
    bucket: Tensor  # (n,) int64: the bucket of each of those, of all anchors' buckets


class Buckets:
    """Each of `b` anchors' thresholds in ascending order, and which two of them a value lies between: its bucket.

    Bisection is slow, so a grid over each anchor's thresholds first says how many lie in lower cells than the value.
    Most values have a cell without any threshold, and that is their bucket; the others are compared with the few of
    their own cell. What the grid rounds it rounds alike for values and thresholds, so the answer is exact.

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
        self.low = torch.where(low.isfinite(), low, 0)
        high = torch.where(finite, self.table, self.low).amax(1, keepdim=True)
        limits = torch.finfo(low.dtype)
        self.cells = min(_CELLS, max(16, 2**19 // max(len(low), 1)))  # no more memory than a tile's
        self.scale = (self.cells / (high - self.low).clamp(min=limits.tiny)).clamp(max=limits.max)
        self.row = torch.arange(len(low), device=low.device)[:, None]
        cell = self._cell(torch.where(finite, self.table, self.low)) - self.row * (self.cells + 2)
        inside = cell.new_zeros(len(low), self.cells + 2).scatter_add_(1, cell, finite.long())
        self.below = inside.cumsum(1) - inside + self.row * self.size  # buckets, of all anchors' buckets
        self.is_crowded = inside.view(-1) > 0
        self.steps = int(inside.max()) if inside.numel() else 0

    def _cell(self, values: Tensor) -> Tensor:
        # what is no number falls anywhere: the sums will be none either
        cell = (values - self.low).mul_(self.scale).nan_to_num_(0).clamp_(-1, self.cells).add_(1).long()
        return cell.add_(self.row * (self.cells + 2))

    def find(self, values: Tensor) -> Found:
        """Where `(b, w)` values fall."""
        cell = self._cell(values)
        if self.steps > _STEPS:
            bucket = torch.searchsorted(self.table, values, right=True) + self.row * self.size
            return Found(cell, torch.arange(cell.numel(), device=cell.device), bucket.view(-1))
        flat = cell.view(-1)  # index_select, for plain indexing is several times slower
        crowded = self.is_crowded.index_select(0, flat).nonzero().squeeze(1)
        bucket = self.below.view(-1).index_select(0, flat.index_select(0, crowded))
        among = values.reshape(-1).index_select(0, crowded)
        table = self.table.view(-1)
        for _ in range(self.steps):
            bucket += table.index_select(0, bucket) <= among
        return Found(cell, crowded, bucket)

    def of(self, values: Tensor) -> Tensor:
        """`(b, w)`: how many of its anchor's thresholds each value is not below."""
        found = self.find(values)
        bucket = self.below.view(-1)[found.cell]
        bucket.view(-1)[found.crowded] = found.bucket
        return bucket - self.row * self.size

    def by_cell(self, weights: Tensor) -> Tensor:
        """`(b, buckets)` numbers, as a table of the cells instead."""
        return weights.view(-1)[self.below]

    def lookup(self, found: Found, weights: Tensor, by_cell: Tensor) -> Tensor:
        """`(b, w)`: the number of each value's bucket."""
        made = by_cell.view(-1).index_select(0, found.cell.view(-1))
        made.index_copy_(0, found.crowded, weights.view(-1).index_select(0, found.bucket))
        return made.view(found.cell.shape)

    def count(self, found: Found, times: Tensor | None, into: list[Tensor]) -> None:
        """Adds how many values fall where, each counted so many `times` (None is once)."""
        flat = None if times is None else times.reshape(-1).double()
        if self.steps <= _STEPS:
            into[0] += torch.bincount(found.cell.view(-1), flat, self.below.numel())
        crowded = None if flat is None else flat.index_select(0, found.crowded)
        into[1] += torch.bincount(found.bucket, crowded, self.table.numel())

    def nothing_counted(self) -> list[Tensor]:
        """What `count` is to add to: by cell, and by bucket for the values of crowded cells."""
        like = self.table.double()
        return [like.new_zeros(self.below.numel()), like.new_zeros(self.table.numel())]

    def counted(self, counts: list[Tensor]) -> Tensor:
        """`(b, buckets)`: how many values each bucket has."""
        cells = torch.where(self.is_crowded, 0, counts[0])
        return counts[1].index_add(0, self.below.view(-1), cells).view(self.table.shape)

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
