"""How many negatives lie below a threshold, and what they add up to: all triplets without a triplet.

An anchor's hinge over all triplets is, for each positive p, the sum over the negatives whose violation
`u_p - v_n + margin` is above 0: those with `v_n` below a threshold that depends on p alone. So negatives are
dropped into the buckets between an anchor's sorted thresholds, once each, and cumulative sums answer every
positive: `O(N log P)` per anchor in place of `O(N P)`, with counts that equal those of the plain triplets.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.statistics import Elementwise, Running, Statistic

Thresholds = Callable[[Tensor], Tensor]  # (P,) distances of the positives -> (P, K) thresholds


class Below(Statistic):
    """For each threshold: the sum of `f(s_n)` over the negatives with `f(s_n) <` threshold, and their number.

    Args:
        f: what is compared with the thresholds, larger being farther.
        thresholds: the thresholds that each positive asks about. `Gathered.value` and `.number` are `(P, K)`.
    """

    needs_positives = True

    def __init__(self, f: Elementwise, thresholds: Thresholds) -> None:
        self.f, self.thresholds = f, thresholds

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        assert positives is not None  # needs_positives says so to the engine
        return _RunningBelow(self.f, anchors, positives.anchor, self.thresholds(positives.s))

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        values = self.f(s)[positives.anchor]  # (P, M)
        times = negatives.to(values.dtype)[positives.anchor]
        asked = self.thresholds(positives.s.detach()).unbind(1)
        below = [times * (values.detach() < t[:, None]) for t in asked]
        return Gathered(
            torch.stack([(values * b).sum(1) for b in below], 1),
            torch.stack([b.sum(1, dtype=torch.float64) for b in below], 1),
        )


class _RunningBelow(Running):
    def __init__(self, f: Elementwise, anchors: int, anchor: Tensor, thresholds: Tensor) -> None:
        self.f = f
        asked = thresholds.shape[1]
        row = anchor.repeat_interleave(asked)
        by_row = row.argsort(stable=True)
        per_row = torch.bincount(row, minlength=anchors)
        start = per_row.cumsum(0) - per_row
        column = torch.empty_like(row)
        column[by_row] = torch.arange(len(row), device=row.device) - start[row[by_row]]
        # each anchor's thresholds in ascending order, filled up with +inf
        table = thresholds.new_full((anchors, int(per_row.max()) if len(row) else 0), torch.inf)
        table[row, column] = thresholds.reshape(-1)
        self.table, order = table.sort(dim=1)
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, places)
        self.row, self.rank, self.shape = row, rank[row, column], thresholds.shape
        buckets = (anchors, table.shape[1] + 1)
        self.sums = table.new_zeros(buckets, dtype=torch.float64)
        self.counts = table.new_zeros(buckets, dtype=torch.float64)

    def _bucket(self, values: Tensor, negatives: Tensor) -> Tensor:
        """How many of its anchor's thresholds each value is not below: the value counts for the others."""
        return torch.searchsorted(self.table, values.masked_fill(negatives == 0, torch.inf), right=True)

    def add(self, s: Tensor, negatives: Tensor) -> None:
        values = self.f(s)
        bucket = self._bucket(values, negatives)
        times = negatives.double()
        self.counts.scatter_add_(1, bucket, times)
        self.sums.scatter_add_(1, bucket, times * values)

    def finish(self) -> Gathered:
        sums, counts = self.sums.cumsum(1), self.counts.cumsum(1)
        return Gathered(sums[self.row, self.rank].view(self.shape), counts[self.row, self.rank].view(self.shape))

    def spread(self, s: Tensor, negatives: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        by_rank = torch.zeros_like(self.sums).index_put_(
            (self.row, self.rank), gradient.reshape(-1).to(self.sums.dtype), accumulate=True
        )
        # a value in bucket k is below the thresholds of rank k and above
        above = by_rank.flip(1).cumsum(1).flip(1)
        values = self.f(s)
        share = above.gather(1, self._bucket(values.detach(), negatives))
        return values, share.to(values.dtype) * negatives


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
