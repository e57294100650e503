"""How far an anchor's negatives are short of a distance, the shortest weighing most."""

from collections import deque

import torch
from torch import Tensor

from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.negatives import Negatives
from gradbank.engine.statistics import Running, Statistic
from gradbank.engine.tile import Tile


class Gaps(Statistic):
    """The sums of `w` and of `w * gap` over each anchor's negatives, `(b, 2)`, and how many negatives there are.

        gap = edge - s_n,   w = exp(temperature * gap),   for the negatives with gap > 0 and s_n > 0

    One statistic in place of two sums, for its gradient is `-w * (temperature * (g_0 + g_1 * gap) + g_1)`.
    """

    def __init__(self, edge: float, temperature: float) -> None:
        self.edge, self.temperature = edge, temperature

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        return _RunningGaps(self, anchors, like)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        number = negatives.to(s.dtype)
        gap, weight = self.weighed(torch.where(number > 0, s, self.edge))
        sums = torch.stack([(x * number).sum(1, dtype=torch.float64) for x in (weight, weight * gap)], 1)
        return Gathered(sums, number.sum(1, dtype=torch.float64))

    def gap(self, s: Tensor) -> Tensor:
        """How far each value is short of the edge."""
        return (self.edge - s).clamp_(min=0)

    def weighed(self, s: Tensor, negatives: Negatives | None = None) -> tuple[Tensor, Tensor]:
        """The gap of each value, and its weight: both 0 where it does not count, since the exponential of what does
        not may be infinite."""
        gap = self.gap(s)
        gap = gap if negatives is None else negatives.zeroed(gap)
        counts = (gap * s).detach().clamp_(min=0).sign_()  # by signs, for masks are slow
        if gap.requires_grad:
            gap = gap * counts
            return gap, (gap * self.temperature).exp() * counts
        weight = (gap.mul_(counts) * self.temperature).exp_().mul_(counts)
        return gap, weight if negatives is None else negatives.weighed(weight)


class _RunningGaps(Running):
    by_anchor = False
    reads_number = True

    def __init__(self, gaps: Gaps, anchors: int, like: Tensor) -> None:
        super().__init__(torch.zeros_like)
        self.gaps = gaps
        self.sums = like.new_zeros(anchors, 2, dtype=torch.float64)
        self.weights: deque[Tensor] = deque()  # of the tiles that are kept for a second sweep, in their order

    def add(self, tile: Tile, negatives: Negatives) -> None:
        gap, weight = self.gaps.weighed(tile.s.detach(), negatives)
        if tile.kept:
            self.weights.append(weight)
        self.sums += torch.stack([weight.sum(1), gap.mul_(weight).sum(1)], 1)

    def leaf(self) -> Tensor:
        return self.sums

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        return Gathered(leaf, self.number)

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        if self.weights:
            gap, weight = self.gaps.gap(s.detach()), self.weights.popleft()
        else:
            gap, weight = self.gaps.weighed(s.detach(), negatives)
        of_weight, of_cost = gradient.to(s.dtype)[:, :1], gradient.to(s.dtype)[:, 1:]
        slope = gap.mul_(-self.gaps.temperature * of_cost).sub_(self.gaps.temperature * of_weight + of_cost)
        return [(s, slope.mul_(weight))]
