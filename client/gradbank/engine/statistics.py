"""Statistics of an anchor's negatives, gathered one tile at a time.

A statistic is declared with the loss; `begin` starts a running one for a block of anchors, which `add`s
tiles in any order and then `finish`es. Given the gradient of a loss with respect to the finished value,
`spread` says what to backpropagate through a tile that is computed again: memory is that of a tile.
`dense` computes the same value from the whole matrix at once, by autograd: the reference.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gradbank.engine.anchors import Gathered, Positives
from gradbank.reducers import Reducer

Elementwise = Callable[[Tensor], Tensor]


class Running:
    """A statistic of a block of `b` anchors while tiles are added to it."""

    def add(self, s: Tensor, negatives: Tensor) -> None:
        """Takes in a `(b, width)` tile of distances or similarities, with its negatives masked or counted."""
        raise NotImplementedError

    def finish(self) -> Gathered:
        raise NotImplementedError

    def spread(self, s: Tensor, negatives: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """`(output, weight)`: backpropagating `weight` through `output`, a function of the tile `s`, is
        backpropagating `gradient` through the finished value."""
        raise NotImplementedError


class Statistic:
    """What a loss wants to know about the negatives of each anchor."""

    needs_positives = False  # whether `begin` wants the positives' distances

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        raise NotImplementedError

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        raise NotImplementedError


class LogSumExp(Statistic):
    """`log(sum_n exp(f(s_n)))` for each anchor; -inf where it has no negative."""

    def __init__(self, f: Elementwise) -> None:
        self.f = f

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        return _RunningLogSumExp(self.f, anchors, like)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        values = _masked(self.f(s), negatives)
        empty = values.isneginf().all(1)
        total = torch.where(empty[:, None], 0, values).logsumexp(1)  # no NaN in the gradient of empty rows
        return Gathered(torch.where(empty, -torch.inf, total))


class _RunningLogSumExp(Running):
    def __init__(self, f: Elementwise, anchors: int, like: Tensor) -> None:
        self.f = f
        self.most = like.new_full((anchors,), -torch.inf)
        self.total = like.new_zeros(anchors, dtype=torch.float64)
        self.value = self.most

    def add(self, s: Tensor, negatives: Tensor) -> None:
        values = _masked(self.f(s), negatives)
        most = torch.maximum(self.most, values.amax(1))
        shift = torch.where(most.isneginf(), 0, most)
        self.total *= (self.most - shift).exp()
        self.total += (values - shift[:, None]).exp_().sum(1)
        self.most = most

    def finish(self) -> Gathered:
        shift = torch.where(self.most.isneginf(), 0, self.most)
        self.value = (shift + self.total.log()).to(self.most.dtype)
        return Gathered(self.value)

    def spread(self, s: Tensor, negatives: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        values = self.f(s)
        some = self.value > -torch.inf
        shift = torch.where(some, self.value, 0)
        share = (_masked(values.detach(), negatives) - shift[:, None]).exp_()
        return values, share.mul_(torch.where(some, gradient, 0)[:, None])


class Reduced(Statistic):
    """The sum of `f(s_n)` over each anchor's negatives that `reducer` counts, and how many it counts."""

    def __init__(self, f: Elementwise, reducer: Reducer) -> None:
        self.f, self.reducer = f, reducer

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        return _RunningReduced(self.f, self.reducer, anchors, like)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        losses = self.f(s)
        weight = self.reducer.weigh(losses.detach(), negatives.to(losses.dtype))
        return Gathered((losses * weight).sum(1), weight.sum(1, dtype=torch.float64))


class _RunningReduced(Running):
    def __init__(self, f: Elementwise, reducer: Reducer, anchors: int, like: Tensor) -> None:
        self.f, self.reducer = f, reducer
        self.total = like.new_zeros(anchors, dtype=torch.float64)
        self.count = like.new_zeros(anchors, dtype=torch.float64)

    def add(self, s: Tensor, negatives: Tensor) -> None:
        losses = self.f(s)
        weight = self.reducer.weigh(losses, negatives.to(losses.dtype))
        self.count += weight.sum(1)
        self.total += (weight * losses).sum(1)

    def finish(self) -> Gathered:
        return Gathered(self.total, self.count)

    def spread(self, s: Tensor, negatives: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        losses = self.f(s)
        weight = self.reducer.weigh(losses.detach(), negatives.to(losses.dtype))
        return losses, weight * gradient.to(losses.dtype)[:, None]


def _masked(values: Tensor, negatives: Tensor) -> Tensor:
    """`values` where there is a negative, raised by the log of how often it counts; -inf elsewhere."""
    if negatives.dtype == torch.bool:
        return values.masked_fill(~negatives, -torch.inf)
    return values + negatives.to(values.dtype).log()
