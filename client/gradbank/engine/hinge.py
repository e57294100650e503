"""The hinge over all triplets, exactly, without making them.

An anchor's hinge is, for each positive p, a sum over the negatives whose violation `u_p - v_n + margin` is above 0:
those with `v_n` below a threshold that depends on p alone. So negatives are dropped into the buckets between an
anchor's thresholds, once each, and cumulative sums answer every positive: `O(N)` per anchor in place of `O(N P)`, with
counts that equal those of the plain triplets.
"""

import math
from collections import deque

import torch
from torch import Tensor, relu

from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.negatives import Negatives
from gradbank.engine.pairs import Interval
from gradbank.engine.statistics import Running
from gradbank.engine.thresholds import Buckets, first_not_above
from gradbank.engine.tile import Tile
from gradbank.engine.triplets import Triplets


class Hinge(Triplets):
    """`relu(d_p - d_n + margin)` over each anchor's triplets, where `d` is a distance: `s`, or `-s` of a similarity.

    Args:
        sign: 1 for distances, -1 for similarities.
        margin: by how much the negative must be farther.
        interval: the `(P, 2)` bounds of the negatives that make a triplet with each positive, `low <= d_n < high`,
            as a function of the `(P,)` distances of the positives; None is all.
    """

    def __init__(self, sign: int, margin: float, interval: Interval | None = None) -> None:
        super().__init__(lambda positive, negative: relu(self.violation(self.f(positive), self.f(negative))))
        self.sign, self.margin, self.interval = sign, margin, interval

    def f(self, s: Tensor) -> Tensor:
        return s if self.sign == 1 else -s

    def violation(self, u: Tensor, v: Tensor) -> Tensor:
        return u - v + self.margin

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        assert positives is not None  # needs_positives says so to the engine
        if not bool(positives.s.isfinite().all()):  # there is no threshold for these
            return super().begin(anchors, like, positives)
        return _RunningHinge(self, anchors, positives)

    def within(self, positive: Tensor, negative: Tensor, weight: Tensor) -> Tensor:
        if self.interval is None:
            return weight
        low, high = self.interval(self.f(positive.detach()).squeeze(1)).unsqueeze(1).unbind(2)
        v = self.f(negative.detach())
        return weight * ((low <= v) & (v < high))

    @property
    def counts_zeros(self) -> bool:
        """Whether a triplet without violation counts."""
        low, high = self.reducer.bounds
        return (low is None or low < 0) and (high is None or high > 0)

    @property
    def counts_every(self) -> bool:
        """Whether all negatives of a positive count, whatever they violate."""
        return self.counts_zeros and self.interval is None

    def thresholds(self, u: Tensor) -> list[tuple[Tensor, float, float]]:
        """Below which distance a negative adds its violation to the sum, counts, or no longer does either, being past
        the reducer's upper bound: `(P,)` each, and what it then adds to the sum and to the count."""
        low, high = self.reducer.bounds
        bound = max(low, 0.0) if low is not None else 0.0

        def first(bound: float, strict: bool) -> Tensor:
            # a few roundings of the terms, each of which is at most this large
            slack = 8 * torch.finfo(u.dtype).eps * (u.abs() + abs(self.margin) + abs(bound))
            return first_not_above(lambda t: self.violation(u, t), u + self.margin - bound, slack, bound, strict)

        if high is not None and high <= bound and not self.counts_zeros:  # nothing lies between the bounds
            return []
        asked = [(first(bound, strict=True), 1.0, 0.0 if self.counts_zeros else 1.0)]
        if high is not None:
            asked.append((first(high, strict=False), -1.0, -1.0))
        if self.interval is None:
            return asked
        # what lies below both bounds, less what lies below both the lower one
        most = torch.finfo(u.dtype).max
        above, below = self.interval(u).clamp(-most, most).unbind(1)
        if self.counts_zeros:
            asked.append((below, 0.0, 1.0))
        return [
            (torch.minimum(t, edge), sign * add, sign * count)
            for t, add, count in asked
            for edge, sign in ((below, 1.0), (above, -1.0))
            if bool((edge > -most).any())  # else no negative is below any of them
        ]


class _RunningHinge(Running):
    def __init__(self, hinge: Hinge, anchors: int, positives: Positives) -> None:
        super().__init__(hinge.f)
        self.hinge = hinge
        u = hinge.f(positives.s)
        asked = hinge.thresholds(u) or [(torch.zeros_like(u), 0.0, 0.0)]
        self.adding = torch.cat([torch.full_like(u, add) for _, add, _ in asked]).double()
        self.counting = torch.cat([torch.full_like(u, count) for _, _, count in asked]).double()
        self.times = positives.times.double().repeat(len(asked))
        self.buckets = Buckets(anchors, positives.anchor.repeat(len(asked)), torch.cat([t for t, _, _ in asked]))
        # how often a value of each bucket is subtracted
        self.share = self.buckets.at_or_above(self.adding * self.times).to(u.dtype)
        self.counts = torch.zeros_like(self.buckets.table, dtype=torch.float64)
        self.total = u.new_zeros(anchors, dtype=torch.float64)
        self.reads_number = hinge.counts_every
        self.shares: deque[Tensor] = deque()  # of the tiles that are kept for a second sweep, in their order

    def add(self, tile: Tile, negatives: Negatives) -> None:
        v, times = self.values(tile.s.detach()), negatives.times()
        bucket = self._buckets(v, negatives)
        share = self.buckets.lookup(bucket, self.share)
        share = share if times is None else share * times
        if tile.kept:
            self.shares.append(share)
        self.counts += self.buckets.count(bucket, times)
        total = torch.linalg.vecdot(share, v)
        if tile.s.device.type != "cpu" or not math.isfinite(total.sum()):  # slower, and seldom needed
            total = negatives.zeroed(torch.where((share > 0) | v.isnan(), share * v, 0)).sum(1)
        self.total += total
        if tile.gathers:
            self.keep([tile.pull(share if self.hinge.sign == 1 else share.neg_(), few=True)])

    def _buckets(self, values: Tensor, negatives: Negatives) -> Tensor:
        """The buckets of the negatives; what is none lies beyond all thresholds."""
        return negatives.elsewhere(self.buckets.find(values), self.buckets.last)

    def leaf(self) -> Tensor:
        return self.total

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        below = self.buckets.below_each(self.counts) * self.times
        shape, anchor = (len(below) // max(len(positives.s), 1), len(positives.s)), positives.anchor
        u = (self.hinge.f(positives.s).double() + self.hinge.margin) * (below * self.adding).view(shape).sum(0)
        counts = (below * self.counting).view(shape).sum(0)
        if self.hinge.counts_every:
            counts = counts + self.number[anchor] * positives.times
        of_positives = torch.zeros_like(leaf).index_add(0, anchor, u)
        return Gathered(of_positives - leaf, torch.zeros_like(self.total).index_add(0, anchor, counts))

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        times = negatives.times()
        if self.shares:
            share = self.shares.popleft()
        else:
            share = self.buckets.lookup(self._buckets(self.values(s.detach()), negatives), self.share)
            share = share if times is None else share * times
        return [(s, share * (gradient * self.hinge.sign).to(share.dtype)[:, None])]
