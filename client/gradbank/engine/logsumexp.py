"""Logarithms of sums of exponentials."""

import torch
from torch import Tensor

from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.functions import Elementwise, Linear, Sloped
from gradbank.engine.negatives import Negatives
from gradbank.engine.statistics import Running, Statistic
from gradbank.engine.tile import Tile


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


def _masked(values: Tensor, negatives: Tensor) -> Tensor:
    """`values` where there is a negative, raised by the log of how often it counts; -inf elsewhere."""
    if negatives.dtype == torch.bool:
        return values.masked_fill(~negatives, -torch.inf)
    return values + negatives.to(values.dtype).log()
