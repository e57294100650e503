"""Soft ranks: how many of an anchor's references lie before a positive, each counted by a sigmoid.

    rank[a, p] = sum_b sigmoid((s[a, b] - s[a, p]) / temperature)

`O(P M)` steps, for P positives, a few positives at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.negatives import Negatives
from gradbank.engine.statistics import Running, Statistic
from gradbank.engine.tile import Tile

_AT_ONCE = 2**18  # pairs of a positive and a reference held at a time


class Ranks(Statistic):
    """The soft rank of each positive among its anchor's negatives: `(P,)`, 0 where nothing lies before it.

    Args:
        temperature: by which differences of similarities are divided.
    """

    needs_positives = True

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        assert positives is not None  # needs_positives says so to the engine
        return _RunningRanks(self.temperature, positives)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        before = ((s[positives.anchor] - positives.s[:, None]) / self.temperature).sigmoid()
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
        for part in torch.split(self.order, max(1, _AT_ONCE // max(s.shape[1], 1))):
            anchor = self.positives.anchor[part]
            before = near[anchor].sub_(self.positives.s[part, None]).div_(self.temperature).sigmoid_()
            yield part, anchor, before, None if times is None else times[anchor]

    def leaf(self) -> Tensor:
        return self.total.to(self.positives.s.dtype)

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        # worth nothing, but with the gradient of the positives
        change = (positives.s - positives.s.detach()) * (self.slope / self.temperature).to(positives.s.dtype)
        return Gathered(leaf + change)

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.zeros_like(s, requires_grad=False)
        scaled = gradient / self.temperature
        for part, anchor, before, times in self._before(s.detach(), negatives):
            slope = (1 - before).mul_(before).mul_(scaled[part, None])
            weight.index_add_(0, anchor, slope if times is None else slope.mul_(times))
        return s, weight


def ranks_among(positives: Positives, anchors: int, temperature: float) -> Tensor:
    """The soft rank of each positive among its anchor's other positives: `(P,)`, differentiable."""
    order = positives.anchor.argsort(stable=True)
    anchor = positives.anchor[order]
    number = torch.bincount(anchor, minlength=anchors)
    first = (number.cumsum(0) - number)[anchor]
    number = number[anchor]

    def of_chunk(s: Tensor, part: Tensor) -> Tensor:
        times = number[part]
        one = torch.arange(len(part), device=part.device).repeat_interleave(times)
        start = first[part] - (times.cumsum(0) - times)
        other = start.repeat_interleave(times) + torch.arange(len(one), device=part.device)
        before = ((s[other] - s[part][one]) / temperature).sigmoid()
        return s.new_zeros(len(part)).index_add(0, one, before) - 0.5  # its own

    s = positives.s[order]
    step = max(1, _AT_ONCE // int(number.max())) if len(s) else 1
    parts = torch.split(torch.arange(len(s), device=s.device), step)
    made = torch.cat([checkpoint(of_chunk, s, part, use_reentrant=False) for part in parts])
    return torch.empty_like(made).index_put((order,), made)
