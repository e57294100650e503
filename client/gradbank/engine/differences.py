"""The histogram of all triplets' differences, exactly, without making the triplets.

A triplet's difference `s_p - s_n` is at or past an edge where `s_n` is below a threshold that depends on the positive
alone. So negatives are dropped into the buckets between an anchor's thresholds, as for the hinge, and cumulative sums
say how many triplets are past each edge, and the sum of their differences.
"""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.negatives import Negatives
from gradbank.engine.statistics import Running
from gradbank.engine.thresholds import Buckets, first_not_above
from gradbank.engine.tile import Tile
from gradbank.engine.triplets import Triplets


class Edges(NamedTuple):
    """`number` edges at `low`, `low + step` and so on, the first bin being what is below all of them."""

    low: float
    step: float
    number: int

    def place(self, differences: Tensor) -> Tensor:
        """How many steps each difference is above the first edge."""
        return (differences - self.low) / self.step

    def sums(self, differences: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`(number + 1,)` float64: the sum of the differences in each bin, and how many there are, weighted."""
        bin = self.place(differences.detach()).floor().clamp(-1, self.number - 1).long() + 1
        none = differences.new_zeros(self.number + 1, dtype=torch.float64)
        total, number = (
            none.index_add(0, bin.reshape(-1), x.double().reshape(-1)) for x in (differences * weight, weight)
        )
        return total, number


class Differences(Triplets):
    """The differences `s_p - s_n` of a block's triplets, by bin: their sums and numbers, `(1, number + 1)`."""

    def __init__(self, edges: Edges) -> None:
        super().__init__(lambda positive, negative: positive - negative)
        self.edges = edges

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        assert positives is not None  # needs_positives says so to the engine
        return _RunningDifferences(self.edges, anchors, positives)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        anchor = positives.anchor
        differences = positives.s[:, None] - s.index_select(0, anchor)
        return self._of(differences, negatives.to(s.dtype)[anchor] * positives.times[:, None])

    def of_list(self, near: Tensor, far: Tensor, triplets: tuple[Tensor, Tensor, Tensor], anchors: int) -> Gathered:
        return self._of(near - far, torch.ones_like(near))

    def _of(self, differences: Tensor, weight: Tensor) -> Gathered:
        sums, number = self.edges.sums(differences, weight)
        return Gathered(sums[None], number[None])


class _RunningDifferences(Running):
    by_anchor = False

    def __init__(self, edges: Edges, anchors: int, positives: Positives) -> None:
        super().__init__(torch.zeros_like)
        self.edges, self.positives = edges, positives
        self.times = positives.times.double()
        thresholds = self._thresholds(positives.s).view(-1)
        self.buckets = Buckets(anchors, positives.anchor.repeat(edges.number), thresholds)
        self.kept_buckets: deque[Tensor] = deque()  # of the tiles that are kept for a second sweep, in their order
        self.mine = positives.s.new_zeros(anchors, dtype=torch.float64).index_add(0, positives.anchor, self.times)
        self.counts = torch.zeros_like(self.buckets.table, dtype=torch.float64)
        self.sums = torch.zeros_like(self.counts)

    def _thresholds(self, u: Tensor) -> Tensor:
        """`(number, P)`: below which distance a negative makes a difference at or past each edge."""
        low, step, number = self.edges
        i = torch.arange(number, dtype=u.dtype, device=u.device)[:, None]
        edge = low + i * step
        # a few roundings of the terms, each of which is at most this large
        slack = 8 * torch.finfo(u.dtype).eps * (u.abs() + abs(low) + edge.abs() + step)
        return first_not_above(lambda t: self.edges.place(u - t) - i, u - edge, slack, 0.0, strict=False)

    def add(self, tile: Tile, negatives: Negatives) -> None:
        s, times = tile.s.detach(), negatives.times()
        bucket = negatives.elsewhere(self.buckets.find(s), self.buckets.last)
        if tile.kept:
            self.kept_buckets.append(bucket)
        self.counts += self.buckets.count(bucket, times)
        self.sums += self.buckets.count(bucket, s if times is None else s * times)

    def leaf(self) -> Tensor:
        """`(1, number + 1)`: the sum of the negatives' distances over all triplets, and over those past each edge."""
        past = self.buckets.below_each(self.sums).view(self.edges.number, -1) * self.times
        return torch.cat([(self.sums.sum(1) * self.mine).sum()[None], past.sum(1)])[None]

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        past = self.buckets.below_each(self.counts).view(self.edges.number, -1)
        number = torch.cat([self.counts.sum(1)[positives.anchor][None], past]) * self.times
        sums = (number * positives.s).sum(1)[None] - leaf
        return Gathered(_between(sums), _between(number.sum(1)[None]))

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        of_past = (gradient[0, 1:, None] * self.times).view(-1)
        share = self.buckets.at_or_above(of_past) + (gradient[0, 0] * self.mine)[:, None]
        bucket = self.kept_buckets.popleft() if self.kept_buckets else self.buckets.find(s.detach())
        return [(s, negatives.weighed(self.buckets.lookup(bucket, share.to(s.dtype))))]


def _between(past: Tensor) -> Tensor:
    """What lies in each bin, given what is past its edge: all but what is past the next."""
    return past - torch.nn.functional.pad(past[:, 1:], (0, 1))
