"""Losses whose anchors are positive pairs: each `(a, p)` is compared with the negatives of a."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradbank.distances import Distance
from gradbank.engine import (
    Anchors,
    Each,
    LabelledPairs,
    Pairs,
    Part,
    References,
    Statistic,
    evaluate,
    every_positive,
    listed_distances,
)
from gradbank.engine.indices import unflattened
from gradbank.losses.base import BaseMetricLossFunction

Cost = Callable[[Tensor, Tensor], Tensor]

NUMBERS_HELD = 2**27  # of the vectors of positive pairs, at most: half a GiB of float32


def negatives_of(pairs: Pairs, anchors: Tensor) -> LabelledPairs:
    """The negatives of some anchors, which may be named several times, as labels tell them.

    Raises:
        ValueError: pairs that were not made of labels.
    """
    source = pairs
    while not isinstance(source, LabelledPairs) and hasattr(source, "base"):
        source = source.base
    if not isinstance(source, LabelledPairs):
        raise ValueError("the negatives of a positive pair are told by labels: pass labels, and no indices_tuple")
    return LabelledPairs(source.labels[anchors], source.ref_labels, positives=False)


def positives_with_negatives(
    pairs: Pairs, embeddings: Tensor, references: References, vectors: int
) -> tuple[Tensor, Tensor]:
    """The positive pairs `(a, p)`; none where there is no negative for them.

    Args:
        vectors: how many vectors of a pair are to be held.

    Raises:
        ValueError: more pairs than can be held.
    """
    known = references.labels if isinstance(pairs, LabelledPairs) else None
    if known is not None and len(known) and bool((known == known[0]).all()):  # one class: nobody has a negative
        none = torch.zeros(0, dtype=torch.int64, device=embeddings.device)
        return none, none
    number = int(pairs.most_positives().sum())
    if number * embeddings.shape[1] * vectors > NUMBERS_HELD:
        raise ValueError(
            f"the loss makes a query of each positive pair, and there are up to {number}, too many to hold: give it "
            "fewer rows, or labels with fewer positives each"
        )
    return every_positive(pairs, len(embeddings), references)


def swapped(loss: BaseMetricLossFunction, embeddings: Tensor, references: References, pairs: Pairs, cost: Cost) -> Any:
    """A loss of triplets in which the nearer of anchor and positive is compared with the negative."""
    a, p = positives_with_negatives(pairs, embeddings, references, vectors=2)
    near = listed_distances(loss.distance, embeddings, references, a, p)
    queries = torch.cat([embeddings.index_select(0, a), references.take(p)], 1)
    declared = _Swapped(loss, near, a, p, pairs, cost)
    return evaluate(declared, queries, references, negatives_of(pairs, a), [near])


def swapped_triplets(
    loss: BaseMetricLossFunction,
    embeddings: Tensor,
    references: References,
    triplets: tuple[Tensor, Tensor, Tensor],
    labels: Tensor | None,
    cost: Cost,
) -> Any:
    """The same of triplets `(a, p, n)` that were named one by one."""
    a, p, n = triplets
    pair, which = torch.unique(a * len(references) + p, return_inverse=True)
    first, second = unflattened(pair, len(references))
    near = listed_distances(loss.distance, embeddings, references, a, p)
    queries = torch.cat([embeddings.index_select(0, first), references.take(second)], 1)
    far = listed_distances(_NearerOfTwo(loss.distance), queries, references, which, n)
    parts = {"loss": {"losses": cost(near, far), "indices": triplets, "reduction_type": "triplet"}}
    return loss.reducer(parts, embeddings, labels)


class _Swapped:
    """A positive pair as an anchor: a query of both its embeddings."""

    joins_anchors = True

    def __init__(
        self, loss: BaseMetricLossFunction, near: Tensor, a: Tensor, p: Tensor, pairs: Pairs, cost: Cost
    ) -> None:
        self.reducer, self.distance = loss.reducer, _NearerOfTwo(loss.distance)
        self.near, self.a, self.p, self.labels, self.cost = near, a, p, pairs.anchor_labels, cost

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"loss": Each(lambda far, near: self.cost(near, far), row=self.near[anchors.place, None])}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        value, number, listed = anchors.found["loss"][:3]
        if listed is not None:
            losses, (i, n) = listed
            return {"loss": Part("triplet", value, listed=(losses, (self.a[i], self.p[i], n)))}
        assert self.labels is not None
        assert number is not None
        sums, counts = (x.new_zeros(len(self.labels)).index_add(0, self.a, x) for x in (value, number))
        return {"loss": Part("triplet", sums, counts=counts, labels=self.labels)}


class _NearerOfTwo(Distance):
    """The smaller of the distances to two embeddings, laid one behind the other."""

    def __init__(self, distance: Distance) -> None:
        super().__init__()
        self.of_each, self.is_inverted = distance, distance.is_inverted

    def _halves(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        half = rows.shape[1] // 2
        return rows[:, :half], rows[:, half:]

    def prepare(self, embeddings: Tensor) -> Tensor:
        return embeddings

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        rows = self.of_each.prepare(references)
        one, two = (self.of_each.pairs(self.of_each.prepare(half), rows) for half in self._halves(queries))
        return torch.maximum(one, two) if self.is_inverted else torch.minimum(one, two)

    def matrix(self, queries: Tensor, references: Tensor) -> Tensor:
        rows = self.of_each.prepare(references)
        one, two = (self.of_each.matrix(self.of_each.prepare(half), rows) for half in self._halves(queries))
        return torch.maximum(one, two) if self.is_inverted else torch.minimum(one, two)
