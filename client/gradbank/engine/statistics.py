"""Statistics of an anchor's negatives, gathered one tile at a time.

A statistic is declared with the loss. `begin` starts a running one for a block of anchors, which takes tiles in any
order; what it comes to is one number per anchor, the `leaf` that the loss is then written on.

Its gradient comes in one of two ways. Where nothing but the anchors wants one, the gradient of each anchor's number
with respect to the anchor's own embedding is gathered along with the number, and only has to be multiplied by what
the loss says of it: one sweep over the references. Otherwise `spread` says what to backpropagate through each tile of
a second sweep. Either way, memory is that of a tile.

`dense` computes the same from the whole matrix by autograd: the reference.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.negatives import Negatives
from gradbank.engine.tile import Tile
from gradbank.reducers import Reducer, counted

Elementwise = Callable[..., Tensor]
Weigh = Callable[[Tensor, Tensor | None], Tensor]  # losses and their weights (None is 1) -> 0 for those not to count


class Linear:
    """`slope * s + intercept`: a function whose derivative is the same everywhere, so that it need not be computed
    everywhere."""

    def __init__(self, slope: float, intercept: float = 0.0) -> None:
        self.slope, self.intercept = slope, intercept

    def __call__(self, s: Tensor) -> Tensor:
        return s * self.slope + self.intercept


class Ramp:
    """`max(0, slope * s + row_slope * row + intercept) ^ power`, whose derivative is known where its base is.

    Args:
        power: 1 or 2.
    """

    def __init__(self, slope: float, intercept: float = 0.0, row_slope: float = 0.0, power: int = 1) -> None:
        self.slope, self.intercept, self.row_slope, self.power = slope, intercept, row_slope, power

    def __call__(self, s: Tensor, *row: Tensor) -> Tensor:
        base = self._sloping(s, *row).relu()
        return base if self.power == 1 else base.square()

    def base(self, s: Tensor, *row: Tensor) -> Tensor:
        """What is raised to the power, without a graph."""
        return self._sloping(s.detach(), *(each.detach() for each in row)).clamp_(min=0)

    def _sloping(self, s: Tensor, *row: Tensor) -> Tensor:
        offset = row[0] * self.row_slope + self.intercept if row else s.new_full((), self.intercept)
        return torch.add(offset, s, alpha=self.slope)


class Sloped:
    """A function given along with its derivative, so that neither needs a graph.

    Args:
        both: from a tensor to the values and the slopes, new tensors both.
    """

    def __init__(self, both: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.both = both

    def __call__(self, s: Tensor) -> Tensor:
        values, slopes = self.both(s.detach())
        return values + (s - s.detach()) * slopes


class EveryPair(NamedTuple):
    """The pairs of a whole batch, one by one."""

    a1: Tensor
    p: Tensor
    a2: Tensor
    n: Tensor


class Running:
    """A statistic of a block of `b` anchors while tiles are added to it.

    Attributes:
        row: `(b, 1)` numbers of the anchors that `f` takes besides the tile, as a leaf; None if it takes none.
        kept: gathered gradients, of each anchor's number with respect to its query `(b, D)` and, if there is a row, to
            its entry `(b, 1)`; None before there are any.
    """

    by_anchor = True  # whether the leaf is one number per anchor, so that its gradient can be gathered

    def __init__(self, f: Elementwise, row: Tensor | None = None) -> None:
        self.f = f
        self.given = row
        self.row = None if row is None else row.detach().requires_grad_()
        self.kept: list[Tensor] | None = None

    def values(self, s: Tensor) -> Tensor:
        made: Tensor = self.f(s) if self.row is None else self.f(s, self.row)
        return made

    def learns(self, like: Tensor) -> bool:
        """Whether `f` is a function of parameters, beyond those in the row: only a second sweep sees to these."""
        with torch.enable_grad():
            none = like.new_zeros(len(like), 1)
            made: Tensor = self.f(none) if self.row is None else self.f(none, self.row.detach())
            return made.requires_grad

    def add(self, tile: Tile, negatives: Negatives) -> None:
        """Takes in a tile of distances or similarities."""
        raise NotImplementedError

    def leaf(self) -> Tensor:
        """What the tiles came to."""
        raise NotImplementedError

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        """The statistic, as a differentiable function of the leaf and of the block's positives."""
        return Gathered(leaf)

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Outputs and their weights: backpropagating these through functions of the tile `s`, and of the row if there
        is one, is backpropagating `gradient` through the leaf."""
        raise NotImplementedError

    def gather(
        self, tile: Tile, values: Tensor, weight: Tensor, decay: Tensor | None = None, few: bool = False
    ) -> None:
        """Adds what `weight` backpropagates through `values` to what is kept, which is first multiplied by `decay`.

        Args:
            few: whether to look for references that get no gradient at all, and leave them out.
        """
        of_s, *of_row = torch.autograd.grad(values, [tile.s] if self.row is None else [tile.s, self.row], weight)
        self.keep([tile.pull(of_s, few), *of_row], decay)

    def keep(self, made: list[Tensor], decay: Tensor | None = None) -> None:
        """Adds to what is kept, which is first multiplied by `decay`."""
        if self.kept is None:
            self.kept = made
            return
        for kept, new in zip(self.kept, made):
            if decay is not None:
                kept.mul_(decay[:, None])
            kept.add_(new)


class Statistic:
    """What a loss wants to know about the negatives of each anchor."""

    needs_positives = False  # whether `begin` wants the positives' distances

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        raise NotImplementedError

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        raise NotImplementedError

    def reduced_by(self, reducer: Reducer) -> None:
        """Tells a statistic that stands for losses which reducer they have."""

    def listed(self, s: Tensor, pairs: EveryPair) -> Gathered | None:
        """The statistic with each of its losses listed, for a reducer that must see them; None if it has none."""
        return None


class LogSumExp(Statistic):
    """`log(sum_n exp(f(s_n)))` for each anchor; -inf where it has no negative."""

    def __init__(self, f: Elementwise, row: Tensor | None = None) -> None:
        self.f, self.row = f, row

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        return _RunningLogSumExp(self.f, self.row, anchors, like)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        values = _masked(self.f(s) if self.row is None else self.f(s, self.row), negatives)
        empty = values.isneginf().all(1)
        total = torch.where(empty[:, None], 0, values).logsumexp(1)  # no NaN in the gradient of empty rows
        return Gathered(torch.where(empty, -torch.inf, total))


class _RunningLogSumExp(Running):
    def __init__(self, f: Elementwise, row: Tensor | None, anchors: int, like: Tensor) -> None:
        super().__init__(f, row)
        self.most = like.new_full((anchors,), -torch.inf)
        self.total = like.new_zeros(anchors, dtype=torch.float64)
        # with a plain slope, the derivative of f is left to the end
        self.slope = f.slope if isinstance(f, Linear) and not isinstance(f.slope, Tensor) else None

    def _values(self, s: Tensor, negatives: Negatives) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is exponentiated, as a function of `s` but for its slopes, if these are the third; and the same where
        there is a negative, to be written to."""
        if isinstance(self.f, Sloped):
            values, slopes = self.f.both(s.detach())
            return s, negatives.logged(values), slopes
        if self.slope is None:
            values = self.values(s)
            return values, negatives.logged(values.detach().clone()), None
        return s, negatives.logged(s.detach() * self.slope), None

    def add(self, tile: Tile, negatives: Negatives) -> None:
        slopes = None
        if self.slope is None:
            values, share, slopes = self._values(tile.s, negatives)
        else:
            values, share = tile.s, negatives.logged(tile.own(self.slope))
        most = torch.maximum(self.most, share.amax(1)) if share.shape[1] else self.most
        shift = torch.where(most.isneginf(), 0, most)
        decay = (self.most - shift).exp()
        share.sub_(shift[:, None]).exp_()
        self.total = self.total * decay + share.sum(1)
        self.most = most
        if not tile.gathers:
            return
        if self.slope is None and slopes is None:
            self.gather(tile, values, share, decay)
        else:
            self.keep([tile.pull(share if slopes is None else share.mul_(slopes), few=False)], decay)

    def leaf(self) -> Tensor:
        shift = torch.where(self.most.isneginf(), 0, self.most)
        self.logarithm = (shift + self.total.log()).to(self.most.dtype)
        if self.kept is not None:  # of the sum of exponentials; its logarithm's is that over the sum
            scale = torch.where(self.total > 0, (self.slope or 1) / self.total, 0).to(self.most.dtype)
            self.kept = [kept.mul_(scale[:, None]) for kept in self.kept]
        return self.logarithm

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        return Gathered(leaf if self.slope is None else leaf + self.f.intercept)  # type: ignore[attr-defined]

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        values, share, slopes = self._values(s, negatives)
        some = self.logarithm > -torch.inf
        share.sub_(torch.where(some, self.logarithm, 0)[:, None]).exp_()
        share.mul_(torch.where(some, gradient * (self.slope or 1), 0)[:, None])
        return [(values, share if slopes is None else share.mul_(slopes))]


class Number(Statistic):
    """How many negatives each anchor has."""

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        return _RunningNumber(anchors, like)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        return Gathered(negatives.to(s.dtype).sum(1))


class _RunningNumber(Running):
    def __init__(self, anchors: int, like: Tensor) -> None:
        super().__init__(torch.zeros_like)
        self.number = like.new_zeros(anchors)

    def add(self, tile: Tile, negatives: Negatives) -> None:
        self.number += negatives.number(tile.s).to(self.number.dtype)

    def leaf(self) -> Tensor:
        return self.number

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
        self.f, self.row, self.weigh = f, row, weigh

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        return _RunningSum(self.f, self.row, self.weigh, anchors, like)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        losses = self.f(s) if self.row is None else self.f(s, self.row)
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
        if isinstance(self.f, Ramp) and self.bounds in ((None, None), (0.0, None)):
            return RunningRamp(self.f, self.row, self.bounds == (None, None), anchors, like)
        return super().begin(anchors, like, positives)

    def listed(self, s: Tensor, pairs: EveryPair) -> Gathered | None:
        row = () if self.row is None else (self.row[pairs.a2],)
        losses = self.f(s[pairs.a2, pairs.n].unsqueeze(1), *row).squeeze(1)
        return Gathered(losses, None, (losses, (pairs.a2, pairs.n)))


class _RunningSum(Running):
    def __init__(self, f: Elementwise, row: Tensor | None, weigh: Weigh | None, anchors: int, like: Tensor) -> None:
        super().__init__(f, row)
        self.weigh = weigh
        self.total = like.new_zeros(anchors, dtype=torch.float64)
        self.count = like.new_zeros(anchors, dtype=torch.float64)

    def _weight(self, losses: Tensor, negatives: Negatives) -> Tensor:
        return negatives.weighed(torch.ones_like(losses) if self.weigh is None else self.weigh(losses, None))

    def add(self, tile: Tile, negatives: Negatives) -> None:
        values = self.values(tile.s)
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
            self.gather(tile, values, weight, few=True)

    def leaf(self) -> Tensor:
        return self.total

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        return Gathered(leaf, self.count)

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        losses = self.values(s)
        return [(losses, self._weight(losses.detach(), negatives) * gradient.to(losses.dtype)[:, None])]


class RunningRamp(Running):
    """The sum of a `Ramp`, and of how many negatives: all, or those for which it is above 0."""

    def __init__(self, ramp: Ramp, row: Tensor | None, counts_every: bool, anchors: int, like: Tensor) -> None:
        super().__init__(ramp, row)
        self.ramp, self.counts_every = ramp, counts_every
        self.total = like.new_zeros(anchors, dtype=torch.float64)
        self.count = like.new_zeros(anchors, dtype=torch.float64)

    def add(self, tile: Tile, negatives: Negatives) -> None:
        base, times = self._base(tile.s, negatives), negatives.times()
        straight = self.ramp.power == 1
        losses = base if straight else base.square()
        total = _times(losses, times).sum(1)
        self.total += total
        if self.counts_every:
            self.count += negatives.number(tile.s)
        if tile.s.device.type == "cpu" and not total.any():  # as is common once a model has learned
            return
        slope = _times(base.sign_() if straight else base, times)
        if not self.counts_every:
            self.count += (slope if straight else _times(losses.sign_(), times)).sum(1)
        if not tile.gathers:
            return
        of_row = [] if self.row is None else [slope.sum(1, keepdim=True).mul_(self.ramp.power * self.ramp.row_slope)]
        self.keep([tile.pull(slope, few=True).mul_(self.ramp.power * self.ramp.slope), *of_row])

    def leaf(self) -> Tensor:
        return self.total

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        return Gathered(leaf, self.count)

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        base = self._base(s, negatives)
        slope = _times(base.sign_() if self.ramp.power == 1 else base, negatives.times())
        slope.mul_((gradient * self.ramp.power).to(s.dtype)[:, None])
        made = []
        if self.row is not None:
            made.append((self.row, slope.sum(1, keepdim=True).mul_(self.ramp.row_slope)))
        return [*made, (s, slope.mul_(self.ramp.slope))]

    def _base(self, s: Tensor, negatives: Negatives) -> Tensor:
        return negatives.zeroed(self.ramp.base(s, *(() if self.row is None else (self.row,))))


def _times(values: Tensor, times: Tensor | None) -> Tensor:
    return values if times is None else values * times


def _masked(values: Tensor, negatives: Tensor) -> Tensor:
    """`values` where there is a negative, raised by the log of how often it counts; -inf elsewhere."""
    if negatives.dtype == torch.bool:
        return values.masked_fill(~negatives, -torch.inf)
    return values + negatives.to(values.dtype).log()
