"""The rows that anchors are compared with."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class References:
    """`(M, D)` rows, held as pieces laid end to end, so that a queue and the batch entering it need no copy.

    Attributes:
        pieces: tensors of `(M_k, D)`, or of `(M_k, D, K)` where a reference is K vectors; a piece that requires a
            gradient gets one.
        labels: `(M,)`, or None when pairs are listed instead of read off labels.
        are_anchors: whether they are the anchors themselves, reference i being anchor i.
    """

    pieces: tuple[Tensor, ...]
    labels: Tensor | None = None
    are_anchors: bool = False

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
