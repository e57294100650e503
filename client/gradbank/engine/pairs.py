"""Which references are positives and negatives of which anchors, read one tile at a time."""

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gradbank.engine.indices import Indices, check_indices, unflattened
from gradbank.engine.listing import Listing

# From (P,) distances of positives to the (P, 2) bounds of their negatives', low <= v < high. Larger is farther.
Interval = Callable[[Tensor], Tensor]


_LOOKED_AT = 2**20  # entries of a tile that is looked through for a negative


class TilePairs(NamedTuple):
    """The pairs of a tile of `rows` anchors and `width` references.

    Positives are few, so they are listed; negatives are most of the tile, so they are masked.
    """

    positives: Tensor  # (P,) int64: position in the flattened tile, row * width + column
    counts: Tensor | None  # (P,) how often each positive counts; None is once
    negatives: Tensor  # (rows, width): bool, or how often each entry counts as a negative


class Groups(NamedTuple):
    """The labels of a batch, each as its place among those that are distinct, and the references that have one."""

    number: int  # of distinct labels
    of_anchor: Tensor  # (B,) int64
    met: Tensor  # int64: the references that are positives of some anchor, by column
    of_met: Tensor  # int64: their labels


class Pairs:
    """Every positive and negative pair of `B` anchors and `M` references."""

    anchor_labels: Tensor | None = None  # (B,)
    anchor_weight: Tensor | None = None  # (B,) what the losses of an anchor are multiplied by
    names_positives: bool = True  # whether there are positives at all, or negatives only
    interval: "Interval | None" = None  # which negatives make a triplet with each positive; None is all

    def tile(self, rows: slice, columns: slice) -> TilePairs:
        raise NotImplementedError

    def most_positives(self) -> Tensor:
        """`(B,)`: a number that each anchor's positives do not exceed; what a block of anchors may need."""
        raise NotImplementedError

    def any_negative(self, anchors: int, references: int) -> bool:
        """Whether there is a negative pair at all, of so many anchors and references."""
        step = max(_LOOKED_AT // max(references, 1), 1)
        some = (slice(start, min(start + step, anchors)) for start in range(0, anchors, step))
        return any(bool(self.tile(rows, slice(0, references)).negatives.any()) for rows in some)

    def listing(self, rows: slice, edges: Tensor) -> Listing | None:
        """The positives of some anchors, and entries that are not their negatives, listed by tile: for pairs where both
        are few. None where only `tile` can tell.

        Args:
            edges: `(T + 1,)` the columns at which the tiles start, and the last one's end.
        """
        return None

    def weight(self, rows: slice, columns: slice) -> Tensor | None:
        """How often each entry of a tile counts as a negative, `(rows, width)` of 0 and 1 as floats, but for those of
        the listing; None is once."""
        return None


class LabelledPairs(Pairs):
    """Positives share the anchor's label; negatives do not.

    Args:
        labels: `(B,)` the anchors'.
        ref_labels: `(M,)` the references'.
        own: `(B,)` each anchor's own column, never its positive: `arange(B)` for a batch against itself,
            the written slots for a queue; None where no reference is an anchor.
        positives: whether to name positives at all.
    """

    def __init__(
        self,
        labels: Tensor,
        ref_labels: Tensor,
        own: Tensor | None = None,
        anchor_weight: Tensor | None = None,
        positives: bool = True,
    ) -> None:
        self.labels, self.ref_labels, self.own = labels, ref_labels, own
        self.anchor_labels = labels
        self.anchor_weight = anchor_weight
        self.names_positives = positives

    def tile(self, rows: slice, columns: slice) -> TilePairs:
        same = self.labels[rows, None] == self.ref_labels[columns]
        negatives = ~same
        if self.own is not None and same.shape[1]:
            column = self.own[rows, None] - columns.start
            near = column.clamp(0, same.shape[1] - 1)  # itself, or else a place that stays as it is
            same.scatter_(1, near, same.gather(1, near) & (column != near))
        same = same if self.names_positives else same[:0]
        return TilePairs(same.view(-1).nonzero().squeeze(1), None, negatives)

    @cached_property
    def groups(self) -> Groups:
        """The batch's labels, in which few references have one."""
        known, of_anchor = torch.unique(self.labels, return_inverse=True)
        place = _places(known, self.ref_labels)
        met = (place >= 0).nonzero().squeeze(1)
        return Groups(len(known), of_anchor, met, place.index_select(0, met))

    def most_positives(self) -> Tensor:
        return self._most_positives

    @cached_property
    def _most_positives(self) -> Tensor:
        groups = self.groups
        return torch.bincount(groups.of_met, minlength=groups.number)[groups.of_anchor]

    def listing(self, rows: slice, edges: Tensor) -> Listing | None:
        # the anchors in order of their group, then each met reference with all anchors of its group
        number, of_anchor, met, of_met = self.groups
        group = of_anchor[rows]
        order = group.argsort()
        size = torch.bincount(group, minlength=number)
        start = size.cumsum(0) - size
        times = size[of_met]
        column = met.repeat_interleave(times)
        total = len(column)
        first = (start[of_met] - times.cumsum(0) + times).repeat_interleave(times, output_size=total)
        row = order[first + torch.arange(total, device=column.device)]
        own = None if self.own is None else column == self.own[rows][row]
        own = own if self.names_positives else torch.ones_like(column, dtype=torch.bool)
        return Listing.of(row, column, own, edges)

    def draw(self, times: int) -> tuple[Tensor, Tensor, Tensor]:
        """`times` random triplets of each anchor that has any, from torch's generator."""
        order = self.ref_labels.argsort(stable=True)
        ordered = _numbers(self.ref_labels[order])
        start, stop = (torch.searchsorted(ordered, self.labels, right=right) for right in (False, True))
        number = stop - start
        among = number.clone()  # of the anchor's label, itself left out
        place = torch.full_like(start, len(order))  # where the anchor itself lies among those
        if self.own is not None:
            rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
            mine = self.ref_labels[self.own] == self.labels
            place = torch.where(mine, rank[self.own] - start, place)
            among -= mine.long()
        some = ((among > 0) & (number < len(order))).nonzero().squeeze(1)
        a = some.repeat_interleave(times)
        p = (torch.rand(len(a), device=a.device) * among[a]).long().clamp_(max=among[a] - 1)
        p += (p >= place[a]).long()
        rest = len(order) - number[a]
        n = (torch.rand(len(a), device=a.device) * rest).long().clamp_(max=rest - 1)
        n += torch.where(n >= start[a], number[a], 0)
        return a, order[start[a] + p], order[n]


class ListedPairs(Pairs):
    """Pairs named one by one: `(a1, p)` are positives, `(a2, n)` negatives.

    Args:
        indices: four int64 tensors; a pair listed twice counts twice, unless `once`.
        shape: `(B, M)`, for the range check.
        labels: `(B,)`, for what else a loss may want of them.

    Raises:
        ValueError: an index outside the batch or the references, or lists of different lengths.
    """

    def __init__(
        self, indices: Indices, shape: tuple[int, int], once: bool = False, labels: Tensor | None = None
    ) -> None:
        a1, p, a2, n = indices
        self.anchor_labels = labels
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
        self.anchor_labels = first.anchor_labels

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


def _places(known: Tensor, labels: Tensor) -> Tensor:
    """`(M,)` int64: where each label stands among the known, which are distinct and ascending; -1 where it does not."""
    known = _numbers(known)
    if not len(known):
        return torch.full_like(labels, -1, dtype=torch.int64)
    if not (known.is_floating_point() or labels.is_floating_point()):
        low, high = map(int, torch.stack([known[0], known[-1]]).tolist())  # a GPU is waited for once
        if high - low <= len(labels):  # looked up at once, rather than searched for
            table = torch.full((high - low + 3,), -1, device=known.device)
            table[known.long() - low + 1] = torch.arange(len(known), device=known.device)
            return table.index_select(0, (labels.long() - low + 1).clamp_(0, len(table) - 1))
    place = torch.searchsorted(known, labels).clamp_(max=len(known) - 1)
    return torch.where(known[place] == labels, place, -1)


def _numbers(ascending: Tensor) -> Tensor:
    """Without NaN, which comes last: it equals no label, and leads a search astray."""
    return ascending[ascending == ascending] if ascending.is_floating_point() else ascending


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
    return *unflattened(flat, shape[1]), counts.float()


def _inside(anchors: Tensor, others: Tensor, counts: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
    """The listed pairs that lie in a tile: `(position in the flattened tile, count)`."""
    start, stop = torch.searchsorted(anchors, torch.tensor([rows.start, rows.stop], device=anchors.device))
    column = others[start:stop] - columns.start
    width = columns.stop - columns.start
    inside = (column >= 0) & (column < width)
    flat = (anchors[start:stop][inside] - rows.start) * width + column[inside]
    return flat, counts[start:stop][inside]
