"""Thresholds: where each value falls among its anchor's, exactly, and the float at which a loss stops counting."""

from collections.abc import Callable

import torch
from torch import Tensor

_CELLS = 32  # of a grid for each threshold: these crowd where the values do
_GRID = 2**21  # cells of all anchors' grids together, at most
_GROUP = 4  # values that are looked at together for one that a grid does not place


class Buckets:
    """Each of `b` anchors' thresholds in ascending order, and which two of them a value lies between: its bucket.

    Buckets are numbered through all anchors, `size` for each: the one below anchor i's first threshold is `i * size`.

    Bisection is slow, so a grid over each anchor's thresholds says how many lie in lower cells than the value's. Most
    cells have one threshold at most, which the value is compared with; in the others it is bisected first. What the
    grid rounds it rounds alike for values and thresholds, so the answer is exact. A finer grid would have fewer of
    those others, and no room in the processor's cache.

    Args:
        anchor: `(Q,)` whose threshold each one is.
        thresholds: `(Q,)`, finite.

    Attributes:
        last: `(b, 1)` int32, each anchor's last bucket, which no value falls in: for what is not to be counted.
    """

    def __init__(self, anchors: int, anchor: Tensor, thresholds: Tensor) -> None:
        by_anchor = anchor.argsort(stable=True)
        number = torch.bincount(anchor, minlength=anchors)
        start = number.cumsum(0) - number
        column = torch.empty_like(anchor)
        column[by_anchor] = torch.arange(len(anchor), device=anchor.device) - start[anchor[by_anchor]]
        most = int(number.max()) if len(anchor) else 0
        table, order = thresholds.new_full((anchors, most), torch.inf).index_put((anchor, column), thresholds).sort(1)
        places = torch.arange(most, device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, places)
        self.anchor, self.rank = anchor, rank[anchor, column]
        self._make_grid(table, max(16, min(_CELLS * most, _GRID // max(anchors, 1))))

    def _make_grid(self, table: Tensor, cells: int) -> None:
        anchors, most = table.shape
        limits = torch.finfo(table.dtype)
        finite = table.abs() < limits.max  # the grid need not reach those that every value is above, or none
        low = torch.where(finite, table, torch.inf).amin(1, keepdim=True) if most else table.new_zeros(anchors, 1)
        self.low = torch.where(low.isfinite(), low, 0)
        high = torch.where(finite, table, self.low).amax(1, keepdim=True) if most else self.low
        self.cells = cells
        self.scale = ((cells - 1) / (high - self.low).clamp(min=limits.tiny)).clamp(max=limits.max)
        row = torch.arange(anchors, device=table.device)[:, None]
        self.row = (row * (cells + 2) + 1).to(table.dtype)
        taken = self._cell(torch.where(table.isfinite(), table, self.low))[table.isfinite()]
        inside = torch.zeros(anchors * (cells + 2), dtype=torch.int32, device=table.device)
        inside.index_add_(0, taken, torch.ones_like(taken))
        crowded = int(inside.max()) if inside.numel() else 0
        self.steps = [2**i for i in reversed(range(1, crowded.bit_length()))]  # before the last one, which is of 1
        # filled up with NaN, which no value is at or above, as far as a bisection may look, and by one bucket more
        self.size = most + 2 ** (len(self.steps) + 1) + 1
        self.table = table.new_full((anchors, self.size), torch.nan)
        self.table[:, :most] = torch.where(table.isfinite(), table, torch.nan)
        below = inside.view(anchors, cells + 2).cumsum(1, dtype=torch.int32).sub_(inside.view(anchors, cells + 2))
        # the bucket of each cell's lowest values, or -1 less that where more than one threshold lies inside
        lowest = below.add_(row.int() * self.size).view(-1)
        self.bucket = torch.where(inside > 1, -1 - lowest, lowest)
        self.last = (row * self.size + self.size - 1).int()

    def _cell(self, values: Tensor) -> Tensor:
        cell = (values - self.low).mul_(self.scale).clamp_(-1, self.cells).add_(self.row)
        return cell.to(torch.int32).clamp_(min=0)  # NaN falls anywhere: the sums will be none either

    def find(self, values: Tensor) -> Tensor:
        """`(b, w)` int32: the bucket of each value."""
        bucket = self.bucket.index_select(0, self._cell(values).view(-1))  # plain indexing is several times slower
        flat, table = values.reshape(-1), self.table.view(-1)
        if self.steps:
            place = _groups_below_zero(bucket)
            found, among = bucket.index_select(0, place), flat.index_select(0, place)
            found ^= found >> 31  # -1 - x where it is negative
            for step in self.steps:
                found.add_(table[step - 1 :].index_select(0, found) <= among, alpha=step)
            bucket.index_copy_(0, place, found)
        return bucket.add_(table.index_select(0, bucket) <= flat).view(values.shape)

    def lookup(self, bucket: Tensor, weights: Tensor) -> Tensor:
        """`(b, w)`: for each value the number that its bucket has among `(b, size)`."""
        return weights.view(-1).index_select(0, bucket.view(-1)).view(bucket.shape)

    def count(self, bucket: Tensor, times: Tensor | None) -> Tensor:
        """`(b, size)` float64: how many values fall in each bucket, each counted so many `times` (None is once)."""
        flat = None if times is None else times.reshape(-1).double()
        made = torch.bincount(bucket.view(-1), flat, self.table.numel()).view(self.table.shape).double()
        made[:, -1] = 0
        return made

    def at_or_above(self, weights: Tensor) -> Tensor:
        """`(b, size)`: the `(Q,)` weights of the thresholds that the values of each bucket are below, added up."""
        by_rank = weights.new_zeros(self.table.shape).index_put_((self.anchor, self.rank), weights, accumulate=True)
        return by_rank.flip(1).cumsum(1).flip(1)

    def below_each(self, counts: Tensor) -> Tensor:
        """`(Q,)`: how many values are below each threshold, given how many, `(b, size)`, are in each bucket."""
        return counts.cumsum(1)[self.anchor, self.rank]


def _groups_below_zero(numbers: Tensor) -> Tensor:
    """Places of `(N,)` numbers, among them all that are below 0: for a few of many, several are looked at together."""
    each = len(numbers) // _GROUP
    groups = (numbers[: each * _GROUP].view(_GROUP, each).amin(0) < 0).nonzero().squeeze(1)
    first = torch.arange(0, each * _GROUP, max(each, 1), device=numbers.device)[:_GROUP]
    rest = torch.arange(each * _GROUP, len(numbers), device=numbers.device)
    return torch.cat([(first[:, None] + groups).view(-1), rest])


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
