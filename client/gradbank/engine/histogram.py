"""Soft histograms: a value is shared between the two nodes of a grid that it lies between.

So a histogram is a piecewise linear function of the values, and has a gradient: what a value in a bin adds to the bin's
upper node it takes from the lower one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.negatives import Negatives, is_finite
from gradbank.engine.statistics import Running, Statistic
from gradbank.engine.tile import Tile


class Grid(NamedTuple):
    """`bins + 1` nodes at `low`, `low + step` and so on; values beyond the ends count as the ends."""

    low: float
    step: float
    bins: int

    def cells(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The cell of each value, bin i being cell `i + 1`, and how far into its bin it lies, 0 to 1."""
        x = self._place(values)
        return _whole(x), x.frac()

    def cell(self, values: Tensor) -> Tensor:
        """The cells alone."""
        return _whole(self._place(values))

    def _place(self, values: Tensor) -> Tensor:
        first = values.new_full((), 1 - self.low / self.step)
        return torch.add(first, values.detach(), alpha=1 / self.step).clamp_(0, self.bins + 1)

    def nodes(self, number: Tensor, shares: Tensor) -> Tensor:
        """`(rows, bins + 1)`: the histogram of what is in each cell, `(rows, bins + 2)` counts and sums of shares."""
        made = number.new_zeros(len(number), self.bins + 1)
        made[:, :-1] += (number - shares)[:, 1:-1]
        made[:, 1:] += shares[:, 1:-1]
        made[:, [0, -1]] += (number + 0 * shares)[:, [0, -1]]
        return made

    def slopes(self, of_nodes: Tensor) -> Tensor:
        """`(rows, bins + 2)`: the gradient of a value in each cell, given that of the nodes, `(rows, bins + 1)`."""
        return torch.nn.functional.pad(of_nodes.diff(dim=1) / self.step, (1, 1))

    def histogram(self, values: Tensor, row: Tensor, rows: int, times: Tensor) -> Tensor:
        """`(rows, bins + 1)` float64: the histograms of `(N,)` values, each of which counts so often in its row."""
        cell, share = self.cells(values)
        inside = (cell > 0) & (cell <= self.bins)
        share = share + torch.where(inside, (values - values.detach()) / self.step, 0)
        place = row * (self.bins + 2) + cell
        none = values.new_zeros(rows * (self.bins + 2), dtype=torch.float64)
        number, shares = (none.index_add(0, place, x.double()) for x in (times, share * times))
        return self.nodes(number.view(rows, self.bins + 2), shares.view(rows, self.bins + 2))


def _whole(x: Tensor) -> Tensor:
    """The cells that places lie in. NaN, which has none, goes to the first, and stays what it is in its share."""
    return x.long() if is_finite(x) else x.nan_to_num(0).long()


class Histogram(Statistic):
    """The soft histogram of each anchor's negatives: `(b, bins + 1)` float64."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        return _RunningHistogram(self.grid, anchors, like)

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        row = torch.arange(len(s), device=s.device).repeat_interleave(s.shape[1])
        times = negatives.to(s.dtype).reshape(-1)
        return Gathered(self.grid.histogram(s.reshape(-1), row, len(s), times))


class _RunningHistogram(Running):
    by_anchor = False

    def __init__(self, grid: Grid, anchors: int, like: Tensor) -> None:
        super().__init__(torch.zeros_like)
        self.grid = grid
        self.number = like.new_zeros(anchors, grid.bins + 2, dtype=torch.float64)
        self.shares = torch.zeros_like(self.number)

    def add(self, tile: Tile, negatives: Negatives) -> None:
        cell, share = self.grid.cells(tile.s)
        none = share.new_zeros(self.number.shape)
        self.number += none.scatter_add(1, cell, negatives.weighed(torch.ones_like(share)))
        self.shares += none.scatter_add(1, cell, negatives.weighed(share))

    def leaf(self) -> Tensor:
        return self.grid.nodes(self.number, self.shares)

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        slopes = self.grid.slopes(gradient).to(s.dtype)
        return [(s, negatives.weighed(slopes.gather(1, self.grid.cell(s))))]
