"""Miners that compare a pair with the anchor's hardest pair of the other kind."""

from dataclasses import field

import torch
from torch import Tensor

from gradbank.component import component
from gradbank.distances import CosineSimilarity, Distance
from gradbank.engine import Bounds, MinedPairs, Pairs, References, full_precision, sweep, widened
from gradbank.miners.base import Miner


@component
class MultiSimilarityMiner(Miner):
    """Keeps the positives that are not clearly closer than the hardest negative, and the reverse.

        (a, p) is kept if  s[a, p] - epsilon < max_n s[a, n]
        (a, n) is kept if  s[a, n] + epsilon > min_p s[a, p]

    Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR 2019.
    """

    epsilon: float = 0.1
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)

    def mine(self, embeddings: Tensor, references: References, pairs: Pairs) -> MinedPairs:
        distance = self.distance
        with full_precision(embeddings.device):
            queries = distance.prepare(widened(embeddings.detach()))
        references = references.detach()
        nearest_negative = queries.new_full((len(queries),), -torch.inf)
        farthest_positive = queries.new_full((len(queries),), torch.inf)
        bounds = Bounds()
        for rows in bounds.blocks(pairs, len(queries), len(references)):
            width = bounds.width(rows)
            for _, s, tile in sweep(distance, queries[rows], references, pairs, rows, width):
                s = distance.closeness(s)
                row = torch.div(tile.positives, s.shape[1], rounding_mode="floor") + rows.start
                farthest_positive.scatter_reduce_(0, row, s.reshape(-1)[tile.positives], "amin")
                negatives = s.masked_fill(tile.negatives == 0, -torch.inf).amax(1)
                torch.maximum(nearest_negative[rows], negatives, out=nearest_negative[rows])

        def keep(rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
            tile = distance.prepare(references.rows(columns).to(queries.dtype))
            s = distance.closeness(distance.matrix(queries[rows], tile))
            as_positive = s - self.epsilon < nearest_negative[rows, None]
            return as_positive, s + self.epsilon > farthest_positive[rows, None]

        return MinedPairs(pairs, keep)
