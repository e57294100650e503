"""A loss of the angle at the negative of a triangle of anchor, positive and negative."""

import math
from collections.abc import Mapping
from dataclasses import field
from typing import ClassVar

from torch import Tensor

from gradbank.component import component
from gradbank.distances import Distance, DotProductSimilarity, LpDistance
from gradbank.engine import (
    Anchors,
    Indices,
    LabelledPairs,
    LogSumExp,
    Pairs,
    Part,
    References,
    Statistic,
    evaluate,
    full_precision,
)
from gradbank.losses.by_pair import positives_with_negatives
from gradbank.losses.pair import PairLoss, softplus
from gradbank.reducers import DoNothingReducer, Reducer


@component
class AngularLoss(PairLoss):
    """Asks that a negative see its anchor and positive at no more than some angle.

        loss[a, p] = log(1 + sum_n exp(4 tan(alpha)^2 (a + p) . n - 2 (1 + tan(alpha)^2) a . p))

    with n over the references with another label than a, whatever an `indices_tuple` lists. Anchors and positives are
    brought to length 1, negatives are not: the loss depends on their length. `O(P D)` numbers are held, for P positive
    pairs.

    Args:
        alpha: the angle, in degrees.

    Raises:
        ValueError: a distance other than `LpDistance()`.

    Wang et al., "Deep Metric Learning with Angular Loss", ICCV 2017.
    """

    alpha: float = 40
    distance: Distance = field(default_factory=LpDistance, kw_only=True)

    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require_distance(LpDistance, p=2, power=1, normalize_embeddings=True)

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Tensor:
        a, p = positives_with_negatives(pairs, embeddings, references, vectors=1)
        labels, known = pairs.anchor_labels, references.labels
        assert labels is not None  # needs_labels
        assert known is not None
        with full_precision(embeddings.device):
            anchors = self.distance.prepare(embeddings)[a]
            positives = self.distance.prepare(references.take(p).to(embeddings.dtype))
            declared = _Angular(self, (anchors * positives).sum(1), a, p, labels)
            negatives = LabelledPairs(labels[a], known, positives=False)
            value = evaluate(declared, anchors + positives, references, negatives, [declared.between])
            if self.reducer.needs_list:  # which sees the batch, and not its pairs as anchors
                value = self.reducer(value, embeddings, labels)
            return self.regularized(value, embeddings)  # type: ignore[no-any-return]

    def compare_listed(
        self, embeddings: Tensor, references: References, indices: Indices, labels: Tensor | None
    ) -> Tensor:
        if len(indices[-1]):
            return super().compare_listed(embeddings, references, indices, labels)
        with full_precision(embeddings.device):  # as PML has it: without a negative pair nothing is compared
            return self.regularized(self.reducer(self.zero_losses(), embeddings, labels), embeddings)  # type: ignore[no-any-return]


class _Angular:
    """A positive pair as an anchor, which is the sum of its two embeddings."""

    joins_anchors = True

    def __init__(self, loss: AngularLoss, between: Tensor, a: Tensor, p: Tensor, labels: Tensor) -> None:
        self.reducer: Reducer = DoNothingReducer() if loss.reducer.needs_list else loss.reducer
        self.distance: Distance = DotProductSimilarity(normalize_embeddings=False)
        self.between, self.a, self.p, self.labels = between, a, p, labels
        self.squared = math.tan(math.radians(loss.alpha)) ** 2

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"seen": LogSumExp(lambda s: 4 * self.squared * s)}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        least = 2 * (1 + self.squared) * self.between[anchors.place]
        losses = softplus(anchors.found["seen"].value - least)
        a, p = self.a[anchors.place], self.p[anchors.place]
        return {"loss": Part("pos_pair", losses, anchor=a, labels=self.labels, listed=(losses, (a, p)))}
