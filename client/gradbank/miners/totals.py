"""How many pairs of a queue there are, and how far apart, where no list is made of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from gradbank.distances import Distance
from gradbank.engine import Bounds, Pairs, References, full_precision, sweep


class Totals(NamedTuple):
    """`(B,)` float64 each: how many positives and negatives an anchor has, and their distances added up."""

    positives: Tensor
    negatives: Tensor
    near: Tensor
    far: Tensor


def totals(distance: Distance, queries: Tensor, references: References, pairs: Pairs) -> Totals:
    """What there is of `pairs` between `(B, D)` prepared queries and references, tile by tile."""
    made = Totals(*queries.new_zeros(4, len(queries), dtype=torch.float64))
    bounds = Bounds.on(queries.device)
    with torch.no_grad(), full_precision(queries.device):
        for rows in bounds.blocks(pairs, len(queries), len(references)):
            for s, positives, negatives in sweep(distance, queries[rows], references, pairs, rows, bounds.width(rows)):
                anchor, times = positives.anchor + rows.start, positives.times.double()
                made.positives.index_add_(0, anchor, times)
                made.near.index_add_(0, anchor, positives.s.double() * times)
                made.negatives[rows] += negatives.weighed(torch.ones_like(s)).sum(1, dtype=torch.float64)
                made.far[rows] += negatives.zeroed(s).sum(1, dtype=torch.float64)
    return made
