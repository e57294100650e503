"""Triplet losses that are the sum of what the positive costs and what the negative costs."""

import torch
from torch import Tensor

from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.functions import Ramp
from gradbank.engine.negatives import Negatives
from gradbank.engine.statistics import Row, Running, detached
from gradbank.engine.sums import RunningRamp
from gradbank.engine.tile import Tile
from gradbank.engine.triplets import RunningTriplets, Triplets
from gradbank.reducers import Reducer


class Separable(Triplets):
    """`of_positive(s_p) + of_negative(s_n)`, both at least 0, over each anchor's triplets.

    The sum over all triplets is the number of negatives times the sum over positives, and the other way around; a
    triplet costs nothing where neither of its two does. So nothing is made but two sums and four counts, unless a
    reducer asks for other bounds. The statistic's `extra`, `(b, 2)`, is how many of both costs of all triplets are
    above 0, and how many triplets there are.

    Args:
        row: `(b, 1)` numbers of the anchors that both ramps also take; they get a gradient.
    """

    needs_positives = False  # but it makes rows, in `dense`, as every statistic of triplets

    def __init__(self, of_positive: Ramp, of_negative: Ramp, row: Tensor | None = None) -> None:
        def kernel(positive: Tensor, negative: Tensor, *row: Tensor) -> Tensor:
            return of_positive(positive, *row) + of_negative(negative, *row)

        super().__init__(kernel, row)
        self.of_positive, self.of_negative = of_positive, of_negative

    def reduced_by(self, reducer: Reducer) -> None:
        super().reduced_by(reducer)
        learned = self.of_positive.is_learned or self.of_negative.is_learned  # of which autograd must see each
        self.needs_positives = learned or reducer.bounds not in ((None, None), (0.0, None))

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        if self.needs_positives:
            assert positives is not None
            return _RunningBounded(self, anchors, positives)
        return _RunningSeparable(self, anchors, like)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        times = negatives.to(s.dtype)
        active = (self.of_negative(s, *self.row).detach().sign() * times).sum(1, dtype=torch.float64)
        extra = self.tally(active, times.sum(1, dtype=torch.float64), positives)
        return super().dense(s, negatives, positives)._replace(extra=extra)

    def of_list(self, near: Tensor, far: Tensor, triplets: tuple[Tensor, Tensor, Tensor], anchors: int) -> Gathered:
        anchor = triplets[0]
        row = self._of_anchors(anchor)
        above = self.of_positive(near, *row).detach().sign() + self.of_negative(far, *row).detach().sign()
        each = torch.stack([above, torch.ones_like(above)], 1).double()
        extra = each.new_zeros(anchors, 2).index_add(0, anchor, each)
        return super().of_list(near, far, triplets, anchors)._replace(extra=extra)

    def costs(self, positives: Positives) -> Tensor:
        """`(P,)`: what each positive costs."""
        return self.of_positive(positives.s, *self._of_anchors(positives.anchor))

    def _of_anchors(self, anchor: Tensor) -> Row:
        return tuple(each.squeeze(1).index_select(0, anchor) for each in self.row)

    def tally(self, active: Tensor, number: Tensor, positives: Positives) -> Tensor:
        """The statistic's `extra`, given for each anchor how many of its negatives cost something, and how many there
        are."""
        anchor, times = positives.anchor, positives.times.double()
        above = self.costs(positives).detach().sign().double()
        of_positives, mine = (torch.zeros_like(number).index_add(0, anchor, x) for x in (above * times, times))
        return torch.stack([of_positives * number + mine * active, mine * number], 1)


class _RunningSeparable(RunningRamp):
    def __init__(self, separable: Separable, anchors: int, like: Tensor) -> None:
        super().__init__(separable.of_negative, separable.row, False, anchors, like)
        self.separable, self.reads_number = separable, True

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        anchor, times = positives.anchor, positives.times.double()

        def of_anchor(each: Tensor) -> Tensor:
            return torch.zeros_like(self.total).index_add(0, anchor, each * times)

        costs, mine = self.separable.costs(positives), of_anchor(torch.ones_like(times))
        # an infinite cost that makes no triplet is none
        of_positives = torch.where(self.number > 0, of_anchor(costs.double()), 0) * self.number
        value = of_positives + torch.where(mine > 0, leaf, 0) * mine
        extra = self.separable.tally(self.count, self.number, positives)
        counts = mine * self.number
        if self.separable.reducer.bounds != (None, None):  # all but those of which neither costs anything
            counts = counts - (mine - of_anchor(costs.detach().sign().double())) * (self.number - self.count)
        return Gathered(value, counts, extra=extra)


class _RunningBounded(RunningTriplets):
    """Every triplet, for a reducer with bounds of its own."""

    reads_number = True

    def __init__(self, separable: Separable, anchors: int, positives: Positives) -> None:
        super().__init__(separable, anchors, positives)
        self.separable = separable
        self.active = torch.zeros_like(self.total)

    def add(self, tile: Tile, negatives: Negatives) -> None:
        super().add(tile, negatives)
        costs = self.separable.of_negative(tile.s.detach(), *detached(self.row))
        self.active += negatives.weighed(costs.sign()).sum(1)

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        extra = self.separable.tally(self.active, self.number, positives)
        return super().gathered(leaf, positives)._replace(extra=extra)
