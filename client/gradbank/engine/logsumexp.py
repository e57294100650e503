"""Logarithms of sums of exponentials."""

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradbank.distances import Distance
from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.functions import Elementwise, Linear, Sloped
from gradbank.engine.negatives import Masked, Negatives
from gradbank.engine.statistics import Running, Statistic, seen_by
from gradbank.engine.tile import Tile


class LogSumExp(Statistic):
    """`log(sum_n exp(f(s_n)))` for each anchor; -inf where it has no negative."""

    bounds: tuple[float, float] | None = None

    def __init__(self, f: Elementwise) -> None:
        self.f = f

    def measured_by(self, distance: Distance) -> None:
        self.bounds = distance.bounds

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        if _is_plain(self.f) and self.bounds is not None:
            least, most = sorted(self.f.slope * bound for bound in self.bounds)
            if least - most > _least(like.dtype):
                return _RunningBounded(self.f, most, anchors, like)
        return _RunningLogSumExp(self.f, anchors, like)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        if _is_plain(self.f):
            return Gathered(_of_negatives(s, negatives, self.f.slope) + self.f.intercept)
        return Gathered(_of_negatives(self.f(seen_by(self.f, s, Masked(negatives))), negatives, 1.0))


class _RunningLogSumExp(Running):
    def __init__(self, f: Elementwise, anchors: int, like: Tensor) -> None:
        super().__init__(f)
        self.most = like.new_full((anchors,), torch.finfo(like.dtype).min)  # of an anchor without a negative, so far
        self.total = like.new_zeros(anchors, dtype=torch.float64)
        # with a plain slope, the derivative of f is left to the end
        self.slope = f.slope if _is_plain(f) else None

    @property
    def _factor(self) -> float:
        """What was left out of the gradient so far."""
        return 1.0 if self.slope is None else self.slope

    def _values(
        self, s: Tensor, negatives: Negatives, made: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is backpropagated through; what is exponentiated where there is a negative, to be written to; and what
        its shares are multiplied by before that, or None. `made` is what `f` gives, where that is known."""
        if isinstance(self.f, Sloped):
            values, slopes = self.f.both(s.detach())
            return s, negatives.logged(values), slopes
        if self.slope is None:
            values = self.values(s, negatives) if made is None else made
            return values, negatives.logged(values.detach().clone()), None
        return s, negatives.logged(s.detach() * self.slope), None

    def add(self, tile: Tile, negatives: Negatives) -> None:
        if self.slope is None:
            made = None if isinstance(self.f, Sloped) else self.values_of(tile, negatives)
            values, share, slopes = self._values(tile.s, negatives, made)
        else:  # in place, where that can be
            values, share, slopes = tile.s, negatives.logged(tile.own(self.slope, tile.s.new_zeros(()))), None
        most = torch.maximum(self.most, share.amax(1)) if share.shape[1] else self.most
        decay = (self.most - most).exp_()
        _exp_(share.sub_(most[:, None]))
        self.total = self.total * decay + share.sum(1)
        self.most = most
        if not tile.gathers:
            return
        if self.slope is None and slopes is None:
            self.gather(tile, negatives, values, share, decay)
        else:
            self.keep([tile.pull(share if slopes is None else share.mul_(slopes), few=False)], decay)

    def leaf(self) -> Tensor:
        none = (self.most == torch.finfo(self.most.dtype).min) | (self.total == 0)
        self.total = torch.where(none, 0, self.total)
        self.logarithm = torch.where(none, -torch.inf, self.most + self.total.log()).to(self.most.dtype)
        if self.kept is not None:  # of the sum of exponentials; its logarithm's is that over the sum
            scale = torch.where(self.total > 0, self._factor / self.total, 0).to(self.most.dtype)
            self.kept = [kept.mul_(scale[:, None]) for kept in self.kept]
        return self.logarithm

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        return Gathered(leaf if self.slope is None else leaf + self.f.intercept)  # type: ignore[attr-defined]

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        values, share, slopes = self._values(s, negatives)
        some = self.logarithm > -torch.inf
        _exp_(share.sub_(torch.where(some, self.logarithm, 0)[:, None]))
        share.mul_(torch.where(some, gradient * self._factor, 0)[:, None])
        return [(values, share if slopes is None else share.mul_(slopes))]


class _RunningBounded(_RunningLogSumExp):
    """The same of numbers that lie so close together, all of them, that none of their exponentials is too small where
    the largest that there may be is 1: no maximum is looked for."""

    def __init__(self, f: Linear, most: float, anchors: int, like: Tensor) -> None:
        super().__init__(f, anchors, like)
        self.most.fill_(most)

    def add(self, tile: Tile, negatives: Negatives) -> None:
        share = negatives.weighed(tile.own(self._factor, -self.most[:, None]).exp_())
        self.total += share.sum(1)
        if tile.gathers:
            self.keep([tile.pull(share, few=False)])

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        some = self.logarithm > -torch.inf
        logarithm = torch.where(some, self.logarithm, self.most)
        share = negatives.weighed(torch.add(-logarithm[:, None], s.detach(), alpha=self._factor).exp_())
        return [(s, share.mul_(torch.where(some, gradient * self._factor, 0)[:, None]))]


def _exp_(share: Tensor) -> Tensor:
    """`exp`, in place, of numbers that are 0 at most; of the very small, and of -inf, next to nothing in place of less.
    Sums do not feel it, but what is below the smallest normal number takes a hundred times as long."""
    return share.clamp_(min=_least(share.dtype)).exp_()


def _least(dtype: torch.dtype) -> float:
    """The smallest number whose exponential is held with room for what it is multiplied by."""
    return 0.7 * math.log(torch.finfo(dtype).tiny)


def _is_plain(f: Elementwise) -> TypeGuard[Linear]:
    """Whether it is linear, with a slope that gets no gradient."""
    return isinstance(f, Linear) and not isinstance(f.slope, Tensor)


def _of_negatives(s: Tensor, negatives: Tensor, slope: float) -> Tensor:
    """The `logsumexp` of `slope * s` over each row's negatives, -inf where there is none: torch's own takes twice as
    many passes over the matrix, and its gradient is NaN there."""
    return _OfNegatives.apply(s, negatives, slope)  # type: ignore[no-untyped-call, no-any-return]  # torch's


class _OfNegatives(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, negatives: Tensor, slope: float) -> Tensor:
        share = Masked(negatives).logged(s * slope)
        most = share.amax(1).clamp_(min=torch.finfo(share.dtype).min) if share.shape[1] else share.new_zeros(len(share))
        total = share.sub_(most[:, None]).exp_().sum(1)
        ctx.slope = slope
        ctx.save_for_backward(share, total)
        return total.log().add_(most)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        share, total = ctx.saved_tensors
        return share * torch.where(total > 0, gradient * ctx.slope / total, 0)[:, None], None, None
