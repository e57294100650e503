"""Losses that weigh pairs by their own similarity."""

from collections.abc import Mapping
from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor, relu

from gradbank.component import component
from gradbank.distances import CosineSimilarity, Distance
from gradbank.engine import Anchors, Linear, LogSumExp, Part, Sloped, Statistic
from gradbank.losses.pair import PairLoss, or_zero, softplus
from gradbank.reducers import AvgNonZeroReducer, Reducer


@component
class MultiSimilarityLoss(PairLoss):
    """Soft-weighs each pair by how it compares with `base` and with the anchor's other pairs.

        loss[a] = log(1 + sum_p exp(-alpha (s[a, p] - base))) / alpha
                + log(1 + sum_n exp(  beta (s[a, n] - base))) / beta

    Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR 2019.
    """

    alpha: float = 2.0
    beta: float = 50.0
    base: float = 0.5
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)

    counts_repeats: ClassVar[bool] = False

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        slope = self.beta * self.distance.sign
        return {"near": LogSumExp(Linear(slope, -slope * self.base))}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        far = anchors.logsumexp(self.alpha * self.distance.margin(anchors.s, self.base))
        near = anchors.found["near"].value
        return {"loss": anchors.per_anchor(softplus(far) / self.alpha + softplus(near) / self.beta)}


@component
class CircleLoss(PairLoss):
    """Weighs each similarity by how far it is from where it should be, which bends the decision boundary to a circle.

        loss[a] = log(1 + sum_p exp(-gamma w_p (s[a, p] - (1 - m))) * sum_n exp(gamma w_n (s[a, n] - m)))
        w_p = relu(1 + m - s[a, p]),   w_n = relu(s[a, n] + m),   constants to the gradient

    An anchor without positives or without negatives costs 0.

    Args:
        m: the relaxation; 0.25 for face recognition and re-identification, 0.4 for fine-grained retrieval.
        gamma: the scale; 256, 128 and 80 there.

    Raises:
        ValueError: a distance other than `CosineSimilarity`.

    Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020.
    """

    m: float = 0.4
    gamma: float = 80.0
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)
    reducer: Reducer = field(default_factory=AvgNonZeroReducer, kw_only=True)

    counts_repeats: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.require_distance(CosineSimilarity)

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"near": LogSumExp(Sloped(self._near))}

    def _near(self, s: Tensor) -> tuple[Tensor, Tensor]:
        weight = (s + self.m).clamp_(min=0).mul_(self.gamma)
        return (s - self.m).mul_(weight), weight

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        s, near = anchors.s, anchors.found["near"].value
        far = anchors.logsumexp(-self.gamma * relu(1 + self.m - s.detach()) * (s - (1 - self.m)))
        return {"loss": anchors.per_anchor(softplus(far + near))}


@component
class LiftedStructureLoss(PairLoss):
    """Compares each positive pair with the negatives of both its members.

        loss[a, p] = relu(log(sum_n exp(neg_margin - d[a, n]) + sum_n exp(neg_margin - d[p, n])) + d[a, p]
                          - pos_margin)^2 / 2

    With `ref_emb`, or in a queue, only the anchor has negatives: PML then takes the reference's position for that of
    an anchor.

    Song et al., "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR 2016.
    """

    neg_margin: float = 1.0
    pos_margin: float = 0.0

    joins_anchors: ClassVar[bool] = True

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        sign = self.distance.sign
        return {"near": LogSumExp(Linear(sign, -sign * self.neg_margin))}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        near = anchors.found["near"].value
        joint = anchors.each(near)
        if anchors.among_themselves:
            _, anchor, _, other = anchors.positives
            others = torch.where(other == anchor, -torch.inf, near[other])
            none = joint.isneginf() & others.isneginf()  # of which the sum has no gradient
            joint = torch.logaddexp(torch.where(none, 0, joint), others).masked_fill(none, -torch.inf)
        far = self.distance.margin(anchors.s, self.pos_margin)
        some = near.isfinite().any()  # without any negatives there is no loss at all
        return {"loss": anchors.per_positive(relu(or_zero(joint) + far) ** 2 / 2 * some)}


@component
class GeneralizedLiftedStructureLoss(PairLoss):
    """The lifted structure loss by anchor, over all of its positives at once.

        loss[a] = relu(log sum_p exp(d[a, p] - pos_margin) + log sum_n exp(neg_margin - d[a, n]))

    where the logarithm of an empty sum is 0.

    Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017 (arXiv 1703.07737).
    """

    neg_margin: float = 1.0
    pos_margin: float = 0.0

    counts_repeats: ClassVar[bool] = False

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        sign = self.distance.sign
        return {"near": LogSumExp(Linear(sign, -sign * self.neg_margin))}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        far = anchors.logsumexp(self.distance.margin(anchors.s, self.pos_margin))
        near = anchors.found["near"].value
        return {"loss": anchors.per_anchor(relu(or_zero(far) + or_zero(near)))}
