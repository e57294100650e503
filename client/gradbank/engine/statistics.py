"""Statistics of an anchor's negatives, gathered one tile at a time.

A statistic is declared with the loss. `begin` starts a running one for a block of anchors, which takes tiles in any
order; what it comes to is one number per anchor, the `leaf` that the loss is then written on.

Its gradient comes in one of two ways. Where nothing but the anchors wants one, the gradient of each anchor's number
with respect to the anchor's own embedding is gathered along with the number, and only has to be multiplied by what
the loss says of it: one sweep over the references. Otherwise `spread` says what to backpropagate through each tile of
a second sweep. Either way, memory is that of a tile.

`dense` computes the same from the whole matrix by autograd: the reference.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from gradbank.distances import Distance
from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.functions import Elementwise
from gradbank.engine.negatives import Negatives, among
from gradbank.engine.tile import Tile
from gradbank.reducers import Reducer

Row = tuple[Tensor, ...]  # what a function takes of the anchors besides distances: one tensor, or nothing


def detached(row: Row) -> Row:
    return tuple(each.detach() for each in row)


class EveryPair(NamedTuple):
    """The pairs of a whole batch, one by one."""

    a1: Tensor
    p: Tensor
    a2: Tensor
    n: Tensor


def is_own(f: Elementwise) -> bool:
    """Whether a function is a user's own, which need be finite, and have a derivative, of negatives only."""
    return not (getattr(f, "__module__", None) or "").startswith("gradbank.")


def seen_by(f: Elementwise, s: Tensor, negatives: Negatives) -> Tensor:
    """The distances as a function may see them: one of a user's own sees those of negatives only."""
    return among(s, negatives) if is_own(f) else s


class Running:
    """A statistic of a block of `b` anchors while tiles are added to it.

    Attributes:
        given: `(b, 1)` numbers of the anchors that `f` takes besides the tile: one such tensor, or none.
        row: the same as leaves.
        kept: gathered gradients, of each anchor's number with respect to its query `(b, D)` and, if there is a row, to
            its entry `(b, 1)`; None before there are any.
    """

    by_anchor = True  # whether the leaf is one number per anchor, so that its gradient can be gathered
    reads_number = False
    number: Tensor  # (b,) float64, how many negatives each anchor has: known once all tiles are added, to who reads it

    def __init__(self, f: Elementwise, row: Row = ()) -> None:
        self.f, self.given = f, row
        self.row = tuple(each.detach().requires_grad_() for each in row)
        self.kept: list[Tensor] | None = None

    def values(self, s: Tensor, negatives: Negatives | None = None) -> Tensor:
        """`f` of a tile; of a user's own, if the negatives are given, where there are some."""
        made: Tensor = self.f(s if negatives is None else seen_by(self.f, s, negatives), *self.row)
        return made

    def values_of(self, tile: Tile, negatives: Negatives) -> Tensor:
        """The same, at once, and again with the negatives given where that is not finite, as is seldom."""
        made = self.values(tile.s)
        if is_own(self.f) and not math.isfinite(made.detach().sum()):
            made = self.values(tile.s, negatives)
        return made

    def learns(self, like: Tensor) -> bool:
        """Whether `f` is a function of parameters, beyond those in the row: only a second sweep sees to these."""
        with torch.enable_grad():
            none = like.new_zeros(len(like), 1)
            made: Tensor = self.f(none, *detached(self.row))
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

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Outputs and their weights: backpropagating these through functions of the tile `s`, and of the row if there
        is one, is backpropagating `gradient` through the leaf."""
        raise NotImplementedError

    def gather(
        self,
        tile: Tile,
        negatives: Negatives,
        values: Tensor,
        weight: Tensor,
        decay: Tensor | None = None,
        few: bool = False,
    ) -> None:
        """Adds what `weight` backpropagates through `values` to what is kept, which is first multiplied by `decay`.

        Args:
            few: whether to look for references that get no gradient at all, and leave them out.
        """
        of_s, *of_row = torch.autograd.grad(values, [tile.s, *self.row], weight)
        if is_own(self.f) and not math.isfinite(sum(each.sum() for each in (of_s, *of_row))):  # as is seldom
            of_s, *of_row = torch.autograd.grad(self.values(tile.s, negatives), [tile.s, *self.row], weight)
        self.keep([tile.pull(of_s, few), *of_row], decay)

    def keep(self, made: list[Tensor], decay: Tensor | None = None) -> None:
        """Adds to what is kept, which is first multiplied by `decay`."""
        if self.kept is None:
            self.kept = made
            return
        for kept, new in zip(self.kept, made):
            if decay is None:
                kept.add_(new)
            else:
                torch.addcmul(new, kept, decay[:, None], out=kept)


class Statistic:
    """What a loss wants to know about the negatives of each anchor."""

    needs_positives = False  # whether `begin` wants the positives' distances
    makes_rows = False  # whether `dense` holds a row of M numbers for each positive

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        raise NotImplementedError

    def dense(self, s: Tensor, negatives: Tensor, positives: Positives) -> Gathered:
        raise NotImplementedError

    def reduced_by(self, reducer: Reducer) -> None:
        """Tells a statistic that stands for losses which reducer they have."""

    def measured_by(self, distance: Distance) -> None:
        """Tells a statistic what makes the distances."""

    def listed(self, s: Tensor, pairs: EveryPair) -> Gathered | None:
        """The statistic with each of its losses listed, for a reducer that must see them; None if it has none."""
        return None
