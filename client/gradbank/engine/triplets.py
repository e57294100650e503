"""Losses of triplets: any function of an anchor's distances to a positive and to a negative."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.each import triplets_of
from gradbank.engine.negatives import Masked, Negatives, among
from gradbank.engine.room import room
from gradbank.engine.statistics import EveryPair, Row, Running, Statistic, detached, seen_by
from gradbank.engine.tile import Tile
from gradbank.reducers import MeanReducer, Reducer, counted

Kernel = Callable[..., Tensor]  # distances of positives and negatives, and the anchors' row -> losses

_AT_ONCE = 2**20  # triplets of a tile held at a time


class Triplets(Statistic):
    """`kernel(s_p, s_n)` over each anchor's triplets, as the reducer counts them: their sum.

    Its name is that of the part of the loss that it is. Every triplet is computed, a few at a time; where the kernel
    is simple enough to be summed without, a subclass does that.

    Args:
        kernel: elementwise, of tensors that broadcast.
        row: `(b, 1)` numbers of the anchors that the kernel also takes; they get a gradient.
    """

    needs_positives = makes_rows = True

    def __init__(self, kernel: Kernel, row: Tensor | None = None) -> None:
        self.kernel = kernel
        self.row: Row = () if row is None else (row,)
        self.reducer: Reducer = MeanReducer()

    def reduced_by(self, reducer: Reducer) -> None:
        self.reducer = reducer

    def losses(self, anchor: Tensor, positive: Tensor, negative: Tensor, row: Row) -> Tensor:
        made: Tensor = self.kernel(positive, negative, *(each.index_select(0, anchor) for each in row))
        return made

    def within(self, positive: Tensor, negative: Tensor, weight: Tensor) -> Tensor:
        """The weights of triplets, 0 for those that are not asked for."""
        return weight

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        assert positives is not None  # needs_positives says so to the engine
        return RunningTriplets(self, anchors, positives)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        anchor = positives.anchor
        far = seen_by(self.kernel, s, Masked(negatives)).index_select(0, anchor)
        losses = self.losses(anchor, positives.s[:, None], far, self.row)  # (P, M)
        weight = negatives.to(losses.dtype)[anchor] * positives.times[:, None]
        weight = self.reducer.weigh(losses.detach(), self.within(positives.s[:, None], s[anchor], weight))
        sums, counts = counted(losses, weight).sum(1, dtype=torch.float64), weight.sum(1, dtype=torch.float64)
        value, number = (x.new_zeros(len(s)).index_add(0, anchor, x) for x in (sums, counts))
        return Gathered(value, number)

    def listed(self, s: Tensor, pairs: EveryPair) -> Gathered:
        a, p, n = triplets_of(pairs)
        return self.of_list(s[a, p], s[a, n], (a, p, n), len(s))

    def of_list(self, near: Tensor, far: Tensor, triplets: tuple[Tensor, Tensor, Tensor], anchors: int) -> Gathered:
        """The statistic of `(T,)` triplets `(a, p, n)`, given the distances of their positives and negatives."""
        anchor = triplets[0]
        losses = self.losses(anchor, near, far, tuple(each.squeeze(1) for each in self.row))
        weight = self.reducer.weigh(losses.detach(), torch.ones_like(losses))
        sums = (x.new_zeros(anchors, dtype=torch.float64) for x in (losses, weight))
        value, number = (x.index_add(0, anchor, y.double()) for x, y in zip(sums, (counted(losses, weight), weight)))
        return Gathered(value, number, (losses, triplets))


class RunningTriplets(Running):
    """Every triplet of a block of anchors, a few positives at a time."""

    def __init__(self, triplets: Triplets, anchors: int, positives: Positives) -> None:
        super().__init__(triplets.kernel, triplets.row)
        self.triplets, self.positives = triplets, positives
        self.order = positives.anchor.argsort(stable=True)
        self.of_positives = torch.zeros_like(positives.s)  # of each anchor's sum
        self.total = positives.s.new_zeros(anchors, dtype=torch.float64)
        self.count = torch.zeros_like(self.total)

    def learns(self, like: Tensor) -> bool:
        if not len(self.positives.s):
            return False
        with torch.enable_grad():  # of a triplet that may be there: a kernel of one's own may refuse others
            near = self.positives.s[:1, None].detach()
            return self.triplets.losses(self.positives.anchor[:1], near, near, detached(self.row)).requires_grad

    def add(self, tile: Tile, negatives: Negatives) -> None:
        of_s, of_row = torch.zeros_like(tile.s), [torch.zeros_like(each) for each in self.row]
        far = among(tile.s.detach(), negatives)
        for part in torch.split(self.order, max(1, room(_AT_ONCE, far.device) // max(far.shape[1], 1))):
            anchor, times = self.positives.anchor[part], self.positives.times[part]
            with torch.enable_grad():
                near, away = self.positives.s[part, None].requires_grad_(), far[anchor].requires_grad_()
                losses = self.triplets.losses(anchor, near, away, self.row)
            weight = negatives.weighed(torch.ones_like(tile.s))[anchor] * times[:, None]
            weight = self.triplets.within(near.detach(), away.detach(), weight)
            weight = self.triplets.reducer.weigh(losses.detach(), weight)
            self.total.index_add_(0, anchor, counted(losses.detach(), weight).sum(1, dtype=torch.float64))
            self.count.index_add_(0, anchor, weight.sum(1, dtype=torch.float64))
            of_near, of_away, *more = torch.autograd.grad(losses, [near, away, *self.row], weight)
            self.of_positives[part] += of_near.squeeze(1)
            of_s.index_add_(0, anchor, of_away)
            for total, each in zip(of_row, more):
                total += each
        if tile.gathers:
            self.keep([tile.pull(of_s, few=True), *of_row])

    def leaf(self) -> Tensor:
        return self.total

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        # worth nothing, but with the gradient of the positives
        s = torch.where(positives.s.isfinite(), positives.s, 0)  # what is infinite has no gradient, or no loss has one
        change = (s - s.detach()).double() * self.of_positives
        return Gathered(leaf + torch.zeros_like(leaf).index_add(0, positives.anchor, change), self.count)

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        far = among(s, negatives)
        for part in torch.split(self.order, max(1, room(_AT_ONCE, s.device) // max(s.shape[1], 1))):
            anchor, times = self.positives.anchor[part], self.positives.times[part]
            losses = self.triplets.losses(anchor, self.positives.s[part, None], far.index_select(0, anchor), self.row)
            weight = negatives.weighed(torch.ones_like(s))[anchor] * times[:, None]
            weight = self.triplets.within(self.positives.s[part, None], far.detach()[anchor], weight)
            weight = self.triplets.reducer.weigh(losses.detach(), weight)
            yield counted(losses, weight).sum(1), gradient.to(s.dtype)[anchor]
