"""Soft ranks: how many of an anchor's references lie before a positive, each counted by a sigmoid.

    rank[a, p] = sum_b sigmoid((s[a, b] - s[a, p]) / temperature)

`O(P M)` steps, for P positives, a few positives at a time.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.eager import refuse_second_derivatives
from gradbank.engine.negatives import Negatives
from gradbank.engine.room import room
from gradbank.engine.statistics import Running, Statistic
from gradbank.engine.tile import Tile

_AT_ONCE = 2**18  # pairs of a positive and a reference held at a time


class Ranks(Statistic):
    """The soft rank of each positive among its anchor's negatives: `(P,)`, 0 where nothing lies before it.

    Args:
        temperature: by which differences of similarities are divided.
    """

    needs_positives = makes_rows = True

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        assert positives is not None  # needs_positives says so to the engine
        return _RunningRanks(self.temperature, positives)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        before = ((s.index_select(0, positives.anchor) - positives.s[:, None]) / self.temperature).sigmoid()
        return Gathered((before * negatives.to(s.dtype)[positives.anchor]).sum(1))


class _RunningRanks(Running):
    by_anchor = False

    def __init__(self, temperature: float, positives: Positives) -> None:
        super().__init__(torch.zeros_like)
        self.temperature, self.positives = temperature, positives
        self.order = positives.anchor.argsort(stable=True)
        self.total = torch.zeros_like(positives.s, dtype=torch.float64)
        self.slope = torch.zeros_like(self.total)  # of each rank, in its positive's similarity

    def add(self, tile: Tile, negatives: Negatives) -> None:
        for part, _, before, times in self._before(tile.s.detach(), negatives):
            self.total[part] += (before if times is None else before * times).sum(1)
            slope = (1 - before).mul_(before)
            self.slope[part] -= (slope if times is None else slope * times).sum(1)

    def _before(self, s: Tensor, negatives: Negatives) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """Some positives at a time: which ones, their anchors, whether each column lies before them, and how often."""
        near, times = -negatives.beyond(-s), negatives.times()
        for part in torch.split(self.order, max(1, room(_AT_ONCE, s.device) // max(s.shape[1], 1))):
            anchor = self.positives.anchor[part]
            before = near[anchor].sub_(self.positives.s[part, None]).div_(self.temperature).sigmoid_()
            yield part, anchor, before, None if times is None else times[anchor]

    def leaf(self) -> Tensor:
        return self.total.to(self.positives.s.dtype)

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        # worth nothing, but with the gradient of the positives
        change = (positives.s - positives.s.detach()) * (self.slope / self.temperature).to(positives.s.dtype)
        return Gathered(leaf + change)

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        weight = torch.zeros_like(s, requires_grad=False)
        scaled = gradient / self.temperature
        for part, anchor, before, times in self._before(s.detach(), negatives):
            slope = (1 - before).mul_(before).mul_(scaled[part, None])
            weight.index_add_(0, anchor, slope if times is None else slope.mul_(times))
        return [(s, weight)]


def ranks_among(positives: Positives, anchors: int, temperature: float | Tensor) -> Tensor:
    """The soft rank of each positive among its anchor's other positives: `(P,)`, differentiable once."""
    s = positives.s
    if isinstance(temperature, Tensor):  # which may be learned
        s, temperature = s / temperature, 1.0
    made: Tensor = _RanksAmong.apply(s, positives.anchor, anchors, temperature)  # type: ignore[no-untyped-call]
    return made


class _RanksAmong(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Tensor, anchor: Tensor, anchors: int, temperature: float) -> Tensor:
        ctx.save_for_backward(s, anchor)
        ctx.anchors, ctx.temperature = anchors, temperature
        rank = torch.zeros_like(s)
        for table in _tables(anchor, anchors):
            for some, _, before in table.before(s, temperature):
                rank[some] = before.sum(1) - 0.5  # its own
        return rank

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        s, anchor = ctx.saved_tensors
        gradient = gradient / ctx.temperature
        made = torch.zeros_like(s)
        for table in _tables(anchor, ctx.anchors):
            of_table = s.new_zeros(table.inside.shape)
            for some, row, before in table.before(s, ctx.temperature):
                slope = (1 - before).mul_(before).mul_(gradient[some, None])
                made[some] -= slope.sum(1)
                of_table.index_add_(0, row, slope)
            made[table.members] += of_table[table.inside]
        return made, None, None, None


class _Table(NamedTuple):
    """Anchors with about as many positives each, which are side by side."""

    place: Tensor  # (a, k) which positives
    inside: Tensor  # (a, k) where there is one

    @property
    def members(self) -> Tensor:
        return self.place[self.inside]

    def before(self, s: Tensor, temperature: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Some positives at a time: which ones, their rows, and whether each of the row lies before them."""
        near = s[self.place].masked_fill_(~self.inside, -torch.inf)
        step = max(1, room(_AT_ONCE, s.device) // self.place.shape[1])
        rows = self.inside.nonzero(as_tuple=True)[0]
        for some, row in zip(torch.split(self.members, step), torch.split(rows, step)):
            yield some, row, near[row].sub_(s[some, None]).div_(temperature).sigmoid_()


def _tables(anchor: Tensor, anchors: int) -> Iterator[_Table]:
    """The `(P,)` positives by anchor, those with most of them first."""
    by_anchor = anchor.argsort(stable=True)
    number = torch.bincount(anchor, minlength=anchors)
    first = number.cumsum(0) - number
    number, order = number.sort(descending=True)
    sizes, start = number.tolist(), 0
    while start < anchors and sizes[start]:
        most = sizes[start]
        some = slice(start, start + max(1, room(_AT_ONCE, anchor.device) // most))
        column = torch.arange(most, device=anchor.device)
        inside = column < number[some, None]
        yield _Table(by_anchor[torch.where(inside, first[order[some], None] + column, 0)], inside)
        start = some.stop
