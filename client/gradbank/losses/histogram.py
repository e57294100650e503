"""A loss of how far the histograms of positives and negatives overlap."""

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradbank.checks import MOST_BINS, check_counts
from gradbank.component import component
from gradbank.distances import CosineSimilarity, Distance
from gradbank.engine import (
    Anchors,
    Indices,
    LabelledPairs,
    ListedPairs,
    Pairs,
    Part,
    References,
    Statistic,
    as_pairs,
    evaluate,
)
from gradbank.engine.histogram import Grid, Histogram
from gradbank.losses.pair import PairLoss
from gradbank.mismatch import Mismatch
from gradbank.reducers import MeanReducer, Reducer


@component
class HistogramLoss(PairLoss):
    """The probability that a random negative is more similar than a random positive.

        loss = sum_k h-[k] * sum_{j <= k} h+[j]

    where h+ and h- are the soft histograms, each of sum 1, of the similarities of the unordered pairs {a, p} and
    {a, n} of all triplets: nodes part `[-1, 1]` evenly, and a similarity is shared between the two that it lies
    between. Similarities beyond the ends count as the ends (PML raises at 1).

    Args:
        n_bins: into how many bins the similarities are sorted; None is 100, if `delta` is None too.
        delta: how wide a bin is, in place of `n_bins`.

    Raises:
        ValueError: a delta that is not `2 / n_bins`, or what does not make 1 to 10,000 bins.

    Ustinova and Lempitsky, "Learning Deep Embeddings with Histogram Loss", NIPS 2016.
    """

    n_bins: int | None = None
    delta: float | None = None
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)

    takes_references: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.n_bins is not None:
            check_counts(self, "n_bins", most=MOST_BINS)
            if self.delta not in (None, 2 / self.n_bins):
                raise Mismatch(
                    f"delta must be 2 / n_bins if both are given, got n_bins={self.n_bins} and delta={self.delta}: "
                    "pass one of them"
                )
        self.delta = 2 / (self.n_bins or 100) if self.delta is None else self.delta
        if not 2 / MOST_BINS <= self.delta <= 2:
            raise ValueError(f"delta must be from {2 / MOST_BINS} to 2, got {self.delta}")

    def grid(self) -> Grid:
        """Where the nodes of both histograms lie."""
        assert self.delta is not None  # since it was built
        return Grid(-1.0, self.delta, math.ceil(2 / self.delta - 1e-6))  # 2 / delta may be rounded up

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
        assert isinstance(pairs, LabelledPairs)  # neither queues nor lists come here
        _, group, number = torch.unique(pairs.labels, return_inverse=True, return_counts=True)
        alone = number[group] == 1
        anchors, labels = embeddings[~alone], pairs.labels[~alone]
        # a pair of two anchors comes up twice, once from either; that with a row which is alone in its class, and so
        # no anchor of a triplet, is made to do so too
        others = embeddings[alone]
        known = torch.cat([labels, pairs.labels[alone], pairs.labels[alone]])
        own = torch.arange(len(anchors), device=anchors.device)
        chosen = LabelledPairs(labels, known, own)
        return self._of(embeddings, anchors, References((anchors, others, others), known), chosen, pairs.labels)

    def compare_listed(
        self, embeddings: Tensor, references: References, indices: Indices, labels: Tensor | None
    ) -> Any:
        shape = (len(embeddings), len(references))
        a1, p, a2, n = as_pairs(indices, embeddings.device)
        ListedPairs((a1, p, a2, n), shape)  # refuses what does not fit
        of_positives, of_negatives = torch.isin(a1, a2), torch.isin(a2, a1)  # those that are in a triplet
        a1, p, a2, n = a1[of_positives], p[of_positives], a2[of_negatives], n[of_negatives]
        unordered = (torch.minimum(a1, p), torch.maximum(a1, p), torch.minimum(a2, n), torch.maximum(a2, n))
        return self._of(embeddings, embeddings, references, ListedPairs(unordered, shape, once=True), labels)

    def _of(
        self, embeddings: Tensor, anchors: Tensor, references: References, pairs: Pairs, labels: Tensor | None
    ) -> Any:
        return self.reduced(evaluate(_Overlap(self), anchors, references, pairs), embeddings, labels)


class _Overlap:
    joins_anchors = True

    def __init__(self, loss: HistogramLoss) -> None:
        self.grid, self.distance = loss.grid(), loss.distance
        self.reducer: Reducer = MeanReducer()

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"negatives": Histogram(self.grid)}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        positives = anchors.positives
        mine = self.grid.histogram(positives.s, torch.zeros_like(positives.anchor), 1, positives.times).squeeze(0)
        others = anchors.found["negatives"].value.sum(0)
        return {"loss": anchors.reduced((_density(others) * _density(mine).cumsum(0)).sum())}


def _density(histogram: Tensor) -> Tensor:
    number = histogram.detach().sum()
    return histogram / torch.where(number == 0, 1, number)
