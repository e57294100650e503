"""Which references are positives and negatives of which anchors, read one tile at a time."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradbank.engine.indices import Indices, check_indices


class TilePairs(NamedTuple):
    """The pairs of a tile of `rows` anchors and `width` references.

    Positives are few, so they are listed; negatives are most of the tile, so they are masked.
    """

    positives: Tensor  # (P,) int64: position in the flattened tile, row * width + column
    counts: Tensor | None  # (P,) how often each positive counts; None is once
    negatives: Tensor  # (rows, width): bool, or how often each entry counts as a negative


class Pairs:
    """Every positive and negative pair of `B` anchors and `M` references."""

    anchor_weight: Tensor | None = None  # (B,) what the losses of an anchor are multiplied by

    def tile(self, rows: slice, columns: slice) -> TilePairs:
        raise NotImplementedError

    def most_positives(self) -> Tensor:
        """`(B,)`: a number that each anchor's positives do not exceed; what a block of anchors may need."""
        raise NotImplementedError


class LabelledPairs(Pairs):
    """Positives share the anchor's label; negatives do not.

    Args:
        labels: `(B,)` the anchors'.
        ref_labels: `(M,)` the references'.
        own: `(B,)` each anchor's own column, never its positive: `arange(B)` for a batch against itself,
            the written slots for a queue; None where no reference is an anchor.
    """

    def __init__(
        self,
        labels: Tensor,
        ref_labels: Tensor,
        own: Tensor | None = None,
        anchor_weight: Tensor | None = None,
    ) -> None:
        self.labels, self.ref_labels, self.own = labels, ref_labels, own
        self.anchor_weight = anchor_weight

    def tile(self, rows: slice, columns: slice) -> TilePairs:
        same = self.labels[rows, None] == self.ref_labels[columns]
        negatives = ~same
        if self.own is not None:
            column = self.own[rows] - columns.start
            inside = (column >= 0) & (column < same.shape[1])
            same[inside.nonzero(as_tuple=True)[0], column[inside]] = False
        return TilePairs(same.view(-1).nonzero().squeeze(1), None, negatives)

    def most_positives(self) -> Tensor:
        ordered = self.ref_labels.sort().values
        above = torch.searchsorted(ordered, self.labels, right=True)
        return above - torch.searchsorted(ordered, self.labels)


class ListedPairs(Pairs):
    """Pairs named one by one: `(a1, p)` are positives, `(a2, n)` negatives.

    Args:
        indices: four int64 tensors; a pair listed twice counts twice, unless `once`.
        shape: `(B, M)`, for the range check.

    Raises:
        ValueError: an index outside the batch or the references, or lists of different lengths.
    """

    def __init__(self, indices: Indices, shape: tuple[int, int], once: bool = False) -> None:
        a1, p, a2, n = indices
        self.positives = _sorted_pairs("positive", a1, p, shape, once)
        self.negatives = _sorted_pairs("negative", a2, n, shape, once)
        self.shape = shape

    def tile(self, rows: slice, columns: slice) -> TilePairs:
        positives, counts = _inside(*self.positives, rows, columns)
        flat, times = _inside(*self.negatives, rows, columns)
        height, width = rows.stop - rows.start, columns.stop - columns.start
        negatives = torch.zeros(height * width, dtype=torch.float32, device=flat.device)
        return TilePairs(positives, counts, negatives.index_put_((flat,), times).view(height, width))

    def most_positives(self) -> Tensor:
        return torch.bincount(self.positives[0], minlength=self.shape[0])


class JoinedPairs(Pairs):
    """The pairs of two sources together; `once` lets a pair of both count once."""

    def __init__(self, first: Pairs, second: Pairs, once: bool) -> None:
        self.first, self.second, self.once = first, second, once

    def tile(self, rows: slice, columns: slice) -> TilePairs:
        one, two = self.first.tile(rows, columns), self.second.tile(rows, columns)
        positives = torch.cat([one.positives, two.positives])
        negatives = one.negatives.float() + two.negatives.float()
        if self.once:
            return TilePairs(torch.unique(positives), None, negatives > 0)
        counts = [negatives.new_ones(len(t.positives)) if t.counts is None else t.counts for t in (one, two)]
        return TilePairs(positives, torch.cat(counts), negatives)

    def most_positives(self) -> Tensor:
        return self.first.most_positives() + self.second.most_positives()


class MinedPairs(Pairs):
    """The pairs of `base` that a miner keeps; `keep` gives its two bool masks of a tile, without own pairs."""

    def __init__(self, base: Pairs, keep: Callable[[slice, slice], tuple[Tensor, Tensor]]) -> None:
        self.base, self.keep = base, keep

    def tile(self, rows: slice, columns: slice) -> TilePairs:
        positives, counts, negatives = self.base.tile(rows, columns)
        as_positive, as_negative = self.keep(rows, columns)
        kept = as_positive.reshape(-1)[positives]
        return TilePairs(positives[kept], None if counts is None else counts[kept], negatives * as_negative)

    def most_positives(self) -> Tensor:
        return self.base.most_positives()


def _sorted_pairs(
    kind: str, anchors: Tensor, others: Tensor, shape: tuple[int, int], once: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct pairs in row-major order: `(anchors, others, counts)`."""
    if anchors.shape != others.shape or anchors.ndim != 1:
        raise ValueError(
            f"a {kind} pair is an anchor and a reference: got {tuple(anchors.shape)} anchors and "
            f"{tuple(others.shape)} references"
        )
    check_indices("anchor", anchors, shape[0])
    check_indices(kind, others, shape[1])
    flat, counts = torch.unique(anchors * shape[1] + others, return_counts=True)
    counts = torch.ones_like(counts) if once else counts
    return flat // max(shape[1], 1), flat % max(shape[1], 1), counts.float()


def _inside(anchors: Tensor, others: Tensor, counts: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """The listed pairs that lie in a tile: `(position in the flattened tile, count)`."""
    start, stop = torch.searchsorted(anchors, torch.tensor([rows.start, rows.stop], device=anchors.device))
    column = others[start:stop] - columns.start
    width = columns.stop - columns.start
    inside = (column >= 0) & (column < width)
    flat = (anchors[start:stop][inside] - rows.start) * width + column[inside]
    return flat, counts[start:stop][inside]
