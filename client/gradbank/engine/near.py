"""The distances of positives alone."""

import torch
from torch import Tensor

from gradbank.distances import Distance
from gradbank.engine.listing import Listing
from gradbank.engine.references import References


def distances_of(distance: Distance, queries: Tensor, references: References, listing: Listing, width: int) -> Tensor:
    """The `(P,)` distances of a listing's positives, as a matrix has them.

    That matrix has the references only that are anybody's positives: those of a few of a bank's classes.

    Args:
        queries: `(b, D)` the listing's anchors, prepared.
        width: references at a time.
    """
    row, column = listing.positives()
    met, place = torch.unique(column, return_inverse=True)
    s = queries.new_zeros(len(column))
    for start in range(0, len(met), max(width, 1)):
        some = met[start : start + width]
        with torch.no_grad():
            rows = references.prepare(references.take(some).to(queries.dtype), distance)
            of_some = distance.matrix(queries, rows).reshape(-1)
        inside = ((place >= start) & (place < start + len(some))).nonzero().squeeze(1)
        s[inside] = of_some[row[inside] * len(some) + place[inside] - start]
    return s
