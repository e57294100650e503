"""The positives of a block of anchors, listed once for all tiles."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradbank.engine.negatives import Holes


@dataclass(frozen=True)
class Listing:
    """The entries of a block's row of tiles that are not negatives, in order of their tiles.

    Attributes:
        row: `(H,)` int64, the anchor of each, and column: `(H,)` its reference.
        flat: `(H,)` where each lies in its flattened tile.
        positive: `(H,)` which of them are positives, or None for all; the others are anchors themselves.
        bounds: where each tile's entries start, and the last one's end.
    """

    row: Tensor
    column: Tensor
    flat: Tensor
    positive: Tensor | None
    bounds: list[int]

    @staticmethod
    def of(row: Tensor, column: Tensor, own: Tensor | None, edges: Tensor) -> "Listing":
        """The listing of entries that are in order of their columns."""
        bounds = torch.searchsorted(column, edges)
        tile = torch.bucketize(column, edges, right=True) - 1
        width = (edges[1:] - edges[:-1])[tile]
        flat = row * width + column - edges[tile]
        return Listing(row, column, flat, None if own is None else ~own, bounds.tolist())

    def positives(self) -> tuple[Tensor, Tensor]:
        """The anchor and the column of every positive, tile after tile."""
        if self.positive is None:
            return self.row, self.column
        return self.row[self.positive], self.column[self.positive]

    def tile(self, index: int) -> tuple[Tensor, Holes]:
        """Of one tile: where its positives lie, and all that is not a negative."""
        part = slice(self.bounds[index], self.bounds[index + 1])
        holes = Holes(self.flat[part], self.row[part])
        if self.positive is None:
            return holes.flat, holes
        flat, bounds = self._positives
        return flat[bounds[index] : bounds[index + 1]], holes

    @cached_property
    def _positives(self) -> tuple[Tensor, list[int]]:
        """`flat` and `bounds` of the positives alone."""
        assert self.positive is not None
        below = torch.nn.functional.pad(self.positive.cumsum(0), (1, 0))
        return self.flat[self.positive], below[self.bounds].tolist()
