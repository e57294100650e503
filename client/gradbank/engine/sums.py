"""Sums over negatives, and how many there are."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.functions import Elementwise, Ramp
from gradbank.engine.negatives import Masked, Negatives
from gradbank.engine.statistics import EveryPair, Row, Running, Statistic, detached, seen_by
from gradbank.engine.tile import Tile
from gradbank.reducers import Reducer, counted

Weigh = Callable[[Tensor, Tensor | None], Tensor]  # losses and their weights (None is 1) -> 0 for those not to count


class Number(Statistic):
    """How many negatives each anchor has."""

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        return _RunningNumber(like)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        return Gathered(negatives.to(s.dtype).sum(1))


class _RunningNumber(Running):
    reads_number = True

    def __init__(self, like: Tensor) -> None:
        super().__init__(torch.zeros_like)
        self.like = like

    def add(self, tile: Tile, negatives: Negatives) -> None:
        pass

    def leaf(self) -> Tensor:
        return self.number.to(self.like.dtype)

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        return Gathered(leaf.detach())


class Sum(Statistic):
    """The sum of `f(s_n)` over each anchor's negatives, and how many there are.

    Args:
        f: of a `(b, w)` tile, and of `row` if there is one.
        row: `(b, 1)` numbers of the anchors that `f` also takes, such as a learned threshold; they get a gradient.
        weigh: which values count and so are summed, given them and their weights; None is all.
    """

    def __init__(self, f: Elementwise, row: Tensor | None = None, weigh: Weigh | None = None) -> None:
        self.f, self.weigh = f, weigh
        self.row: Row = () if row is None else (row,)

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        return _RunningSum(self.f, self.row, self.weigh, anchors, like)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        losses = self.f(seen_by(self.f, s, Masked(negatives)), *self.row)
        weight = negatives.to(losses.dtype)
        weight = weight if self.weigh is None else self.weigh(losses.detach(), weight)
        return Gathered(counted(losses, weight).sum(1, dtype=torch.float64), weight.sum(1, dtype=torch.float64))


class Each(Sum):
    """The losses `f(s_n)` of the negatives themselves, as the reducer counts them: the sum over those that count.

    Its name is that of the part of the loss that it is, for that is how the reducer is asked.
    """

    bounds: tuple[float | None, float | None] | None = None

    def reduced_by(self, reducer: Reducer) -> None:
        self.weigh, self.bounds = reducer.weigh, reducer.bounds

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        if isinstance(self.f, Ramp) and not self.f.is_learned and self.bounds in _ALL_OR_ACTIVE:
            return RunningRamp(self.f, self.row, self.bounds == (None, None), anchors, like)
        return super().begin(anchors, like, positives)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        if isinstance(self.f, Ramp) and not self.f.is_learned and self.bounds in _ALL_OR_ACTIVE:
            every = self.bounds == (None, None)
            return Gathered(*_OfRamp.apply(s, self.f, negatives, every, *self.row))  # type: ignore[no-untyped-call]  # torch's
        return super().dense(s, negatives, positives)

    def listed(self, s: Tensor, pairs: EveryPair) -> Gathered | None:
        losses = self.f(s[pairs.a2, pairs.n].unsqueeze(1), *(each[pairs.a2] for each in self.row)).squeeze(1)
        return Gathered(losses, None, (losses, (pairs.a2, pairs.n)))


_ALL_OR_ACTIVE = (None, None), (0.0, None)  # bounds for which a ramp's slope also says what counts


class _RunningSum(Running):
    def __init__(self, f: Elementwise, row: Row, weigh: Weigh | None, anchors: int, like: Tensor) -> None:
        super().__init__(f, row)
        self.weigh = weigh
        self.total = like.new_zeros(anchors, dtype=torch.float64)
        self.count = like.new_zeros(anchors, dtype=torch.float64)

    def _weight(self, losses: Tensor, negatives: Negatives) -> Tensor:
        return negatives.weighed(torch.ones_like(losses) if self.weigh is None else self.weigh(losses, None))

    def add(self, tile: Tile, negatives: Negatives) -> None:
        values = self.values_of(tile, negatives)
        losses = values.detach()
        weight = self._weight(losses, negatives)
        count = weight.sum(1)
        self.count += count
        if tile.s.device.type == "cpu" and not count.any():  # nothing counts, as is common once a model has learned
            return
        total = (losses * weight).sum(1)
        if tile.s.device.type != "cpu" or total.isnan().any():  # slower, and seldom needed
            total = counted(losses, weight).sum(1)
        self.total += total
        if tile.gathers:
            self.gather(tile, negatives, values, weight, few=True)

    def leaf(self) -> Tensor:
        return self.total

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        return Gathered(leaf, self.count)

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        losses = self.values(s, negatives)
        return [(losses, self._weight(losses.detach(), negatives) * gradient.to(losses.dtype)[:, None])]


class RunningRamp(Running):
    """The sum of a `Ramp`, and of how many negatives: all, or those for which it is above 0."""

    def __init__(self, ramp: Ramp, row: Row, counts_every: bool, anchors: int, like: Tensor) -> None:
        super().__init__(ramp, row)
        self.ramp, self.counts_every, self.reads_number = ramp, counts_every, counts_every
        self.offset = ramp.offset(like, *detached(row))
        self.total = like.new_zeros(anchors, dtype=torch.float64)
        self.count = like.new_zeros(anchors, dtype=torch.float64)

    def add(self, tile: Tile, negatives: Negatives) -> None:
        base, times = self._base(tile.s, negatives), negatives.times()
        straight = self.ramp.power == 1
        weighted = _times(base, times)
        total = weighted.sum(1) if straight else torch.linalg.vecdot(base, weighted)
        self.total += total
        if tile.s.device.type == "cpu" and not total.any():  # as is common once a model has learned
            return
        slope = _times(base.sign_(), times) if straight else weighted
        wanted = any(each.requires_grad for each in self.given) and tile.gathers
        sums = slope.sum(1) if wanted or (straight and not self.counts_every) else total
        if not self.counts_every:
            self.count += sums if straight else _times(base.sign(), times).sum(1)
        if not tile.gathers:
            return
        of_row = [sums[:, None] * (self.ramp.power * self.ramp.row_slope)] if wanted else []
        self.keep([tile.pull(slope, few=True).mul_(self.ramp.power * self.ramp.slope), *of_row])

    def leaf(self) -> Tensor:
        return self.total

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        return Gathered(leaf, self.number if self.counts_every else self.count)

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        base = self._base(s, negatives)
        slope = _times(base.sign_() if self.ramp.power == 1 else base, negatives.times())
        slope.mul_((gradient * self.ramp.power).to(s.dtype)[:, None])
        made = [(each, slope.sum(1, keepdim=True).mul_(self.ramp.row_slope)) for each in self.row]
        return [*made, (s, slope.mul_(self.ramp.slope))]

    def _base(self, s: Tensor, negatives: Negatives) -> Tensor:
        return _base_of(self.ramp, self.offset, s.detach(), negatives)


class _OfRamp(torch.autograd.Function):
    """The sum of a `Ramp` over each row's negatives, and how many there are: all, or those for which it is above 0.
    Autograd alone takes twice as many passes over the matrix."""

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, ramp: Ramp, negatives: Tensor, counts_every: bool, *row: Tensor
    ) -> tuple[Tensor, Tensor]:
        held = Masked(negatives)
        base = _base_of(ramp, ramp.offset(s, *row), s, held)
        weighted, active = (_times(each, held.times()) for each in (base, base.sign()))
        losses, slope = (weighted, active) if ramp.power == 1 else (base * weighted, weighted)
        number = (negatives if counts_every else active).sum(1, dtype=torch.float64)
        ctx.ramp = ramp
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(number)
        return losses.sum(1, dtype=torch.float64), number

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        gradient = (gradient * ctx.ramp.power).to(slope.dtype)[:, None]
        of_row = [
            slope.sum(1, keepdim=True) * gradient * ctx.ramp.row_slope if need else None
            for need in ctx.needs_input_grad[4:]
        ]
        return slope * (gradient * ctx.ramp.slope), None, None, None, *of_row


def _base_of(ramp: Ramp, offset: Tensor, s: Tensor, negatives: Negatives) -> Tensor:
    """What is raised to the ramp's power, 0 where there is no negative."""
    return negatives.zeroed(torch.add(offset, s, alpha=ramp.slope).clamp_(min=0))


def _times(values: Tensor, times: Tensor | None) -> Tensor:
    return values if times is None else values * times
