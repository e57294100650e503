"""A loss of the angle at the negative of a triangle of anchor, positive and negative."""

import math
from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gradbank.component import component
from gradbank.distances import Distance, DotProductSimilarity, LpDistance
from gradbank.engine import (
    Anchors,
    Each,
    Indices,
    LabelledPairs,
    Linear,
    LogSumExp,
    Pairs,
    Part,
    References,
    Statistic,
    evaluate,
    look,
)
from gradbank.losses.by_pair import positives_with_negatives
from gradbank.losses.pair import PairLoss, softplus
from gradbank.losses.softmax import radians
from gradbank.reducers import DoNothingReducer, MeanReducer, Reducer


@component
class AngularLoss(PairLoss):
    """Asks that a negative see its anchor and positive at no more than some angle.

        loss[a, p] = log(1 + sum_n exp(4 tan(alpha)^2 (a + p) . n - 2 (1 + tan(alpha)^2) a . p))

    with n over the references with another label than a, whatever an `indices_tuple` lists. Anchors and positives are
    brought to length 1, negatives are not: the loss depends on their length. `O(P D)` numbers are held, for P positive
    pairs.

    Args:
        alpha: the angle, in degrees.

    Attributes:
        average_angle: with `collect_stats`, the mean angle at the negatives, in degrees: `atan(|a - p| / (2 |n - c|))`
            with c between a and p.

    Raises:
        ValueError: a distance other than `LpDistance()`.

    Wang et al., "Deep Metric Learning with Angular Loss", ICCV 2017.
    """

    alpha: float = 40
    distance: Distance = field(default_factory=LpDistance, kw_only=True)
    average_angle: float | None = field(default=None, init=False)

    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require_distance(LpDistance, p=2, power=1, normalize_embeddings=True)

    def record_distance(self, embeddings: Tensor, references: References) -> None:
        pass  # it is not asked, except to bring rows to length 1

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
        a, p = positives_with_negatives(pairs, embeddings, references, vectors=1)
        if not len(a) or not pairs.any_negative(len(embeddings), len(references)):
            return self._of_nothing(embeddings, labels=pairs.anchor_labels)
        labels, known = pairs.anchor_labels, references.labels
        assert labels is not None  # needs_labels
        assert known is not None
        anchors = self.distance.prepare(embeddings).index_select(0, a)
        positives = self.distance.prepare(references.take(p).to(embeddings.dtype))
        declared = _Angular(self, (anchors * positives).sum(1), a, p, labels)
        negatives = LabelledPairs(labels[a], known, positives=False)
        value = evaluate(declared, anchors + positives, references, negatives, [declared.between])
        if self.reducer.needs_list:  # which sees the batch, and not its pairs as anchors
            value = self.reducer(value, embeddings, labels)
        if self.collect_stats:
            angles = _Angles(F.pairwise_distance(anchors.detach(), positives.detach()))
            mean = look(angles, (anchors + positives) / 2, references, negatives)
            self.average_angle = math.degrees(float(mean))
        return value

    def compare_listed(
        self, embeddings: Tensor, references: References, indices: Indices, labels: Tensor | None
    ) -> Any:
        if len(indices[-1]):
            return super().compare_listed(embeddings, references, indices, labels)
        return self._of_nothing(embeddings, labels)

    def _of_nothing(self, embeddings: Tensor, labels: Tensor | None) -> Any:
        """As PML has it: without a negative pair nothing is compared."""
        self.reset_stats()
        return self.reducer(self.zero_losses(), embeddings, labels)


class _Angular:
    """A positive pair as an anchor, which is the sum of its two embeddings."""

    joins_anchors = True

    def __init__(self, loss: AngularLoss, between: Tensor, a: Tensor, p: Tensor, labels: Tensor) -> None:
        self.reducer: Reducer = DoNothingReducer() if loss.reducer.needs_list else loss.reducer
        self.distance: Distance = DotProductSimilarity(normalize_embeddings=False)
        self.between, self.a, self.p, self.labels = between, a, p, labels
        squared = radians(loss.alpha).tan().square()
        self.squared: Any = squared if squared.requires_grad else float(squared)

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"seen": LogSumExp(Linear(4 * self.squared))}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        least = 2 * (1 + self.squared) * self.between[anchors.place]
        losses = softplus(anchors.found["seen"].value - least)
        a, p = self.a[anchors.place], self.p[anchors.place]
        return {"loss": Part("pos_pair", losses, anchor=a, labels=self.labels, listed=(losses, (a, p)))}


class _Angles:
    """The angles at all negatives, as losses of which the mean is to be known.

    Args:
        width: `(P,)` the distance between the members of each positive pair, the anchors being halfway.
    """

    joins_anchors = False

    def __init__(self, width: Tensor) -> None:
        self.width = width
        self.reducer: Reducer = MeanReducer()
        self.distance: Distance = LpDistance(normalize_embeddings=False)

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"angle": Each(lambda d, width: torch.atan(width / (2 * d)), row=self.width[anchors.place, None])}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        return {"angle": anchors.per_negative("angle")}
