"""The pairs that a miner keeps."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from gradbank.distances import Distance
from gradbank.engine.indices import unflattened
from gradbank.engine.listing import Listing
from gradbank.engine.near import distances_of
from gradbank.engine.pairs import Pairs, TilePairs
from gradbank.engine.references import References


class Limits(NamedTuple):
    """Keeps a positive whose closeness, less `slack`, is below its anchor's `far`; and a negative whose closeness, and
    `slack` more, is above its anchor's `near`."""

    far: Tensor  # (B,)
    near: Tensor  # (B,)
    slack: float = 0.0


class MinedPairs(Pairs):
    """The pairs of `base` within limits: whether one is kept depends on its anchor's limits and its own distance.

    Args:
        distance: the miner's.
        queries: `(B, D)`, prepared by it.
        limits: in terms of its closeness, of which more is closer.
    """

    def __init__(
        self, base: Pairs, distance: Distance, queries: Tensor, references: References, limits: Limits
    ) -> None:
        self.base, self.distance, self.queries, self.references = base, distance, queries, references
        self.limits = limits
        self.anchor_labels = base.anchor_labels

    def tile(self, rows: slice, columns: slice) -> TilePairs:
        positives, counts, negatives = self.base.tile(rows, columns)
        s = self._closeness(rows, columns)
        row, _ = unflattened(positives, s.shape[1])
        kept = self._keeps(s.reshape(-1)[positives], row + rows.start)
        near = s + self.limits.slack > self.limits.near[rows, None]
        return TilePairs(positives[kept], None if counts is None else counts[kept], negatives * near)

    def listing(self, rows: slice, edges: Tensor) -> Listing | None:
        listing = self.base.listing(rows, edges)
        if listing is None or len(edges) < 2:  # there is nothing to choose from
            return listing
        whole = replace(listing, positive=None)
        width = int((edges[1:] - edges[:-1]).max())
        s = self.distance.closeness(distances_of(self.distance, self.queries[rows], self.references, whole, width))
        kept = self._keeps(s, listing.row + rows.start)
        return replace(listing, positive=kept if listing.positive is None else kept & listing.positive)

    def weight(self, rows: slice, columns: slice) -> Tensor | None:
        s = self._closeness(rows, columns)
        # the sign is exact, and quicker than a comparison
        return s.add_(self.limits.slack).sub_(self.limits.near[rows, None]).sign_().clamp_(min=0)

    def most_positives(self) -> Tensor:
        return self.base.most_positives()

    def _keeps(self, closeness: Tensor, anchor: Tensor) -> Tensor:
        return closeness - self.limits.slack < self.limits.far[anchor]

    def _closeness(self, rows: slice, columns: slice) -> Tensor:
        with torch.no_grad():
            tile, _, squares = self.references.prepared(self.distance, columns, self.queries.dtype)
            return self.distance.closeness(self.distance.tile(self.queries[rows], tile, squares)).contiguous()


class ChosenPairs(Pairs):
    """The pairs of `base` that `chosen` names too, as often as it does.

    Both are of the same labels, or `chosen` is listed.
    """

    def __init__(self, base: Pairs, chosen: Pairs) -> None:
        self.base, self.chosen = base, chosen
        self.anchor_labels = base.anchor_labels

    def tile(self, rows: slice, columns: slice) -> TilePairs:
        mine, theirs = self.base.tile(rows, columns), self.chosen.tile(rows, columns)
        kept = torch.isin(theirs.positives, mine.positives)
        counts = None if theirs.counts is None else theirs.counts[kept]
        both = theirs.negatives & mine.negatives if theirs.negatives.dtype == torch.bool else theirs.negatives
        return TilePairs(theirs.positives[kept], counts, both)

    def listing(self, rows: slice, edges: Tensor) -> Listing | None:
        theirs = self.chosen.listing(rows, edges)
        mine = None if theirs is None else self.base.listing(rows, edges)
        if mine is None or theirs is None:
            return None
        some = [each.positive for each in (mine, theirs) if each.positive is not None]
        return replace(mine, positive=torch.stack(some).all(0) if some else None)

    def weight(self, rows: slice, columns: slice) -> Tensor | None:
        return self.chosen.weight(rows, columns)

    def most_positives(self) -> Tensor:
        return torch.minimum(self.base.most_positives(), self.chosen.most_positives())
