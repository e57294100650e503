"""The tiles of a block of anchors, one after the other, and whether their positives are worth a list."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gradbank.distances import Distance
from gradbank.engine.anchors import Positives
from gradbank.engine.indices import unflattened
from gradbank.engine.listing import Listing
from gradbank.engine.negatives import Masked, Negatives
from gradbank.engine.pairs import Pairs
from gradbank.engine.references import References


def sweep(
    distance: Distance, queries: Tensor, references: References, pairs: Pairs, rows: slice, width: int
) -> Iterator[tuple[Tensor, Positives, Negatives]]:
    """The tiles of a block of prepared queries: `(b, w)` distances, to be written to, the positives among them and
    which of them are negatives; without gradients."""
    listing = listing_of(pairs, rows, references, width)
    for index, (columns, _, _) in enumerate(references.tiles(width)):
        with torch.no_grad():
            tile, _, squares = references.prepared(distance, columns, queries.dtype)
            s = distance.tile(queries, tile, squares).contiguous()
        negatives: Negatives
        if listing is not None:
            flat, negatives = listing.tile(index)
            counts = None
        else:
            flat, counts, mask = pairs.tile(rows, columns)
            negatives = Masked(mask)
        near = s.reshape(-1)[flat]
        row, column = unflattened(flat, s.shape[1])
        times = torch.ones_like(near) if counts is None else counts.to(s.dtype)
        yield s, Positives(near, row, times, column + columns.start), negatives


def listing_of(pairs: Pairs, rows: slice, references: References, width: int) -> Listing | None:
    """The positives of a block of anchors, if they are few enough for a list to pay."""
    size, number = rows.stop - rows.start, len(references)
    if number and int(pairs.most_positives()[rows].sum()) * 16 > size * number:
        return None
    edges = [columns.start for columns, _, _ in references.tiles(width)] + [number]
    return pairs.listing(rows, torch.tensor(edges, device=references.pieces[0].device))
