"""The rows that anchors are compared with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from gradbank.distances import Distance
from gradbank.engine.room import room


@dataclass(frozen=True)
class References:
    """`(M, D)` rows, held as pieces laid end to end, so that a queue and the batch entering it need no copy.

    Attributes:
        pieces: tensors of `(M_k, D)`, or of `(M_k, D, K)` where a reference is K vectors; a piece that requires a
            gradient gets one.
        labels: `(M,)`, or None when pairs are listed instead of read off labels.
        are_anchors: whether they are the anchors themselves, reference i being anchor i.
        squares: of each piece, the `(M_k,)` squared lengths of its rows, or None where they are not known.
        ready: whether the rows are as the distance wants them already.
    """

    pieces: tuple[Tensor, ...]
    labels: Tensor | None = None
    are_anchors: bool = False
    squares: tuple[Tensor | None, ...] | None = None
    ready: bool = False

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    @property
    def vectors(self) -> int:
        """How many vectors a reference is."""
        return self.pieces[0].shape[2:].numel()

    def detach(self) -> "References":
        return replace(self, pieces=tuple(piece.detach() for piece in self.pieces))

    def tiles(self, width: int) -> Iterator[tuple[slice, int, slice]]:
        """At most `width` rows at a time: their columns, the piece they lie in, and where in that piece."""
        offset = 0
        for index, piece in enumerate(self.pieces):
            for start in range(0, len(piece), width):
                stop = min(start + width, len(piece))
                yield slice(offset + start, offset + stop), index, slice(start, stop)
            offset += len(piece)

    def prepared(
        self, distance: Distance, columns: slice, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The `(w, D)` rows of some columns as `distance` wants them. With them, where it is known: what they were
        multiplied by, `(w, 1)`, and how long they then are, squared, `(w,)`."""
        rows = self.rows(columns)
        if self.ready or not distance.knows_pull:
            return self.prepare(rows.to(dtype), distance), None, None
        squares = self._squares_of(columns) if rows.dtype == dtype else None
        rows = rows.to(dtype)
        inverse = distance.inverse_norms(rows, squares)
        if squares is not None and inverse is not None:
            squares = squares * inverse.view(-1).square()
        return distance.normalized(rows, inverse), inverse, squares

    def prepare(self, rows: Tensor, distance: Distance) -> Tensor:
        """Some of the rows as `distance` wants them."""
        return rows if self.ready else distance.prepare(rows)

    def made_ready(self, distance: Distance, wanted: Sequence[bool]) -> "tuple[References, list[Tensor], list[Tensor]]":
        """The same, ready; and its pieces, as leaves where a gradient is wanted, with what was made of each."""
        given = [piece.detach().requires_grad_(want) for piece, want in zip(self.pieces, wanted)]
        with torch.enable_grad():
            rows = [distance.prepare(piece) for piece in given]
        return replace(self, pieces=tuple(each.detach() for each in rows), squares=None, ready=True), given, rows

    def _squares_of(self, columns: slice) -> Tensor | None:
        """The squared lengths of the rows of some columns, where they lie in a piece of which they are known."""
        start, stop = columns.start, columns.stop
        for piece, squares in zip(self.pieces, self.squares or ()):
            if start < len(piece):
                return None if squares is None or stop > len(piece) else squares[start:stop]
            start, stop = start - len(piece), stop - len(piece)
        return None

    def whole(self) -> Tensor:
        """All rows as one `(M, D)` tensor; a copy unless there is a single piece."""
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces)

    def rows(self, columns: slice) -> Tensor:
        """The rows of some columns: a view where they lie in one piece."""
        parts, offset = [], 0
        for piece in self.pieces:
            part = piece[max(columns.start - offset, 0) : max(columns.stop - offset, 0)]
            offset += len(piece)
            if len(part):
                parts.append(part)
        if not parts:
            return self.pieces[0][:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def take(self, index: Tensor) -> Tensor:
        """The rows at some places, `(N,)`: a copy."""
        if len(self.pieces) == 1:
            return self.pieces[0].index_select(0, index)  # by whole rows; plain indexing goes number by number
        edges = torch.tensor([len(piece) for piece in self.pieces], device=index.device).cumsum(0)
        order = None if bool((index[1:] >= index[:-1]).all()) else index.argsort()
        ordered = index if order is None else index[order]
        ends = torch.searchsorted(ordered, edges).tolist()
        starts = [0, *ends[:-1]]
        offsets = [0, *edges.tolist()[:-1]]
        parts = [
            piece.index_select(0, ordered[start:end] - offset)
            for piece, start, end, offset in zip(self.pieces, starts, ends, offsets)
        ]
        taken = torch.cat(parts)
        return taken if order is None else torch.empty_like(taken).index_copy(0, order, taken)

    def sums(self, index: Tensor, group: Tensor, weight: Tensor, groups: int) -> Tensor:
        """The rows at some places, `(N,)`, weighted and added up by group: `(groups, D)`, of the weights' dtype."""
        ends = list(accumulate(map(len, self.pieces)))
        lies_in = torch.bucketize(index, torch.tensor(ends, device=index.device), right=True)
        order = torch.argsort(lies_in * groups + group)
        sizes = torch.bincount(lies_in, minlength=len(ends)).tolist()
        each = (torch.split(x[order], sizes) for x in (index, group, weight))
        total = weight.new_zeros(groups, self.pieces[0].shape[1])
        for piece, end, places, own, times in zip(self.pieces, ends, *each):
            _sums(piece, places - (end - len(piece)), own, times, total)
        return total


def _sums(piece: Tensor, index: Tensor, group: Tensor, weight: Tensor, total: Tensor) -> Tensor:
    """`References.sums` of one piece, in order of the groups, added to `total`: no row is copied, but for those of
    another dtype, which are converted a few at a time."""
    if piece.dtype != weight.dtype:
        whole = torch.arange(len(index), device=index.device)
        for few in torch.split(whole, max(1, room(_CONVERTED_AT_ONCE, piece.device) // piece.shape[1])):
            rows = piece.index_select(0, index[few]).to(weight.dtype)
            _sums(rows, torch.arange(len(few), device=few.device), group[few], weight[few], total)
        return total
    number = torch.bincount(group, minlength=len(total))
    made: Tensor = F.embedding_bag(index, piece, number.cumsum(0) - number, mode="sum", per_sample_weights=weight)
    return total.add_(made)


_CONVERTED_AT_ONCE = 2**18  # numbers
