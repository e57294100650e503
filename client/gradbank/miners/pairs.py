"""Miners that decide pair by pair, so that a queue needs no list of what they keep."""

from dataclasses import field

import torch
from torch import Tensor

from gradbank.component import component, foundation
from gradbank.distances import CosineSimilarity, Distance
from gradbank.engine import (
    Bounds,
    Indices,
    LabelledPairs,
    Limits,
    MinedPairs,
    Pairs,
    References,
    every_pair,
    full_precision,
    sweep,
    widened,
)
from gradbank.miners.base import Miner
from gradbank.miners.totals import totals


@foundation
class PairMiner(Miner):
    """A miner whose `limits` tell tile by tile which pairs are kept; calling it lists them."""

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Indices:
        own = torch.arange(len(embeddings), device=embeddings.device) if ref_labels is labels else None
        references = References((ref_emb.detach(),), ref_labels)
        kept = self.select(embeddings.detach(), references, LabelledPairs(labels, ref_labels, own))
        if self.collect_stats:
            self.average(kept)
        return tuple(every_pair(kept, len(embeddings), references))

    def select(self, embeddings: Tensor, references: References, pairs: LabelledPairs) -> MinedPairs:
        """Those of `pairs` that the miner keeps."""
        self.distance.record(embeddings, references.pieces)
        with full_precision(embeddings.device):
            queries = self.distance.prepare(widened(embeddings.detach()))
        references = references.detach()
        return MinedPairs(pairs, self.distance, queries, references, self.limits(queries, references, pairs))

    def limits(self, queries: Tensor, references: References, pairs: LabelledPairs) -> Limits:
        """How close a pair of `pairs` must be, for each of the `(B, D)` prepared queries."""
        raise NotImplementedError(f"{type(self).__name__} must define limits, or select")

    def watch(self, embeddings: Tensor, references: References, taken: Pairs) -> None:
        if not isinstance(taken, MinedPairs):  # of a subclass that lists them
            return
        self.reset_stats()
        self.average(taken)
        number = totals(self.distance, taken.queries, taken.references, taken)
        self.num_pos_pairs, self.num_neg_pairs = int(number.positives.sum()), int(number.negatives.sum())

    def average(self, kept: MinedPairs) -> None:
        """Writes the means that the class names, of what was kept and of what that was chosen from."""


@component
class MultiSimilarityMiner(PairMiner):
    """Keeps the positives that are not clearly closer than the hardest negative, and the reverse.

        (a, p) is kept if  s[a, p] - epsilon < max_n s[a, n]
        (a, n) is kept if  s[a, n] + epsilon > min_p s[a, p]

    Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR 2019.
    """

    epsilon: float = 0.1
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)

    def limits(self, queries: Tensor, references: References, pairs: LabelledPairs) -> Limits:
        distance = self.distance
        nearest_negative = queries.new_full((len(queries),), -torch.inf)
        farthest_positive = queries.new_full((len(queries),), torch.inf)
        bounds = Bounds.on(queries.device)
        for rows in bounds.blocks(pairs, len(queries), len(references)):
            for s, positives, negatives in sweep(distance, queries[rows], references, pairs, rows, bounds.width(rows)):
                near = negatives.logged(distance.closeness(s)).amax(1)
                torch.maximum(nearest_negative[rows], near, out=nearest_negative[rows])
                of_positives = distance.closeness(positives.s)
                farthest_positive.scatter_reduce_(0, positives.anchor + rows.start, of_positives, "amin")
        return Limits(nearest_negative, farthest_positive, self.epsilon)


@component
class PairMarginMiner(PairMiner):
    """Keeps the positives that are too far and the negatives that are too close.

        (a, p) is kept if  d[a, p] > pos_margin
        (a, n) is kept if  d[a, n] < neg_margin

    With a similarity in place of a distance both signs are reversed.

    Attributes:
        pos_pair_dist, neg_pair_dist: with `collect_stats`, the mean over all positive and all negative pairs.
    """

    pos_margin: float = 0.2
    neg_margin: float = 0.8
    pos_pair_dist: float | None = field(default=None, init=False)
    neg_pair_dist: float | None = field(default=None, init=False)

    def average(self, kept: MinedPairs) -> None:
        every = totals(self.distance, kept.queries, kept.references, kept.base)
        self.pos_pair_dist = float(every.near.sum() / every.positives.sum().clamp(min=1))
        self.neg_pair_dist = float(every.far.sum() / every.negatives.sum().clamp(min=1))

    def limits(self, queries: Tensor, references: References, pairs: LabelledPairs) -> Limits:
        every = queries.new_full((len(queries),), self.distance.sign)
        return Limits(every * self.pos_margin, every * self.neg_margin)
