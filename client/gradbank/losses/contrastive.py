"""Losses that ask a fixed margin of every pair."""

from collections.abc import Mapping
from dataclasses import field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, relu

from gradbank.component import component
from gradbank.distances import CosineSimilarity, Distance, SNRDistance
from gradbank.engine import (
    Anchors,
    Each,
    LabelledPairs,
    Pairs,
    Part,
    Ramp,
    References,
    Statistic,
    Sum,
    evaluate,
    forced,
    room,
)
from gradbank.losses.pair import PairLoss
from gradbank.reducers import AvgNonZeroReducer, MeanReducer, Reducer


@component
class ContrastiveLoss(PairLoss):
    """Pulls positives within `pos_margin` and pushes negatives beyond `neg_margin`.

        pos_loss[a, p] = relu(d[a, p] - pos_margin)
        neg_loss[a, n] = relu(neg_margin - d[a, n])

    The two are reduced apart and added. With a similarity in place of a distance the differences change sign:
    use `pos_margin=1, neg_margin=0`.

    Hadsell et al., "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006.
    """

    pos_margin: float = 0.0
    neg_margin: float = 1.0
    reducer: Reducer = field(default_factory=AvgNonZeroReducer, kw_only=True)

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        sign = self.distance.sign
        return {"neg_loss": Each(Ramp(sign, -sign * self.neg_margin))}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        too_far = relu(self.distance.margin(anchors.s, self.pos_margin))
        return {"pos_loss": anchors.per_positive(too_far), "neg_loss": anchors.per_negative("neg_loss")}


@component
class SignalToNoiseRatioContrastiveLoss(ContrastiveLoss):
    """`ContrastiveLoss` of the noise-to-signal ratio: how much the difference of two embeddings varies, over how much
    the anchor does.

        pos_loss[a, p] = relu(Var(a - p) / Var(a) - pos_margin)
        neg_loss[a, n] = relu(neg_margin - Var(a - n) / Var(a))

    Raises:
        ValueError: a distance other than `SNRDistance`.

    Yuan et al., "Signal-to-Noise Ratio: A Robust Distance Metric for Deep Metric Learning", CVPR 2019.
    """

    distance: Distance = field(default_factory=SNRDistance, kw_only=True)

    def __post_init__(self) -> None:
        self.require_distance(SNRDistance)


@component
class ThresholdConsistentMarginLoss(PairLoss):
    """Keeps similarities on their side of one threshold: a penalty on hard pairs that makes one threshold do for all
    classes, added to another loss.

        loss = lambda_plus  * mean of (margin_plus - s[a, p])  over the positives with s[a, p] <= margin_plus
             + lambda_minus * mean of (s[a, n] - margin_minus) over the negatives with s[a, n] >= margin_minus

    Unlike PML's it takes `ref_emb` and queues: PML looks a reference's position up in the batch.

    Raises:
        ValueError: a distance other than `CosineSimilarity`.

    Zhang et al., "Learning for Transductive Threshold Calibration in Open-World Recognition", 2023 (arXiv 2307.04047).
    """

    lambda_plus: float = 1.0
    lambda_minus: float = 1.0
    margin_plus: float = 0.9
    margin_minus: float = 0.5
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)

    def __post_init__(self) -> None:
        self.require_distance(CosineSimilarity)

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"near": Sum(lambda s: s - self.margin_minus, weigh=self._counts)}

    def _counts(self, excess: Tensor, weight: Tensor | None) -> Tensor:
        counted = (excess >= 0).to(excess.dtype)
        return counted if weight is None else counted * weight

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        lacking = self.margin_plus - anchors.s
        counts = ((lacking >= 0) * anchors.positives.times).double()
        far, near = (lacking * counts).sum(), anchors.found["near"]
        return {
            "pos_loss": self._mean(self.lambda_plus, far, counts.sum(), anchors),
            "neg_loss": self._mean(self.lambda_minus, near.value.sum(), near.number.sum(), anchors),  # type: ignore[union-attr]
        }

    def _mean(self, times: float, total: Tensor, number: Tensor, anchors: Anchors) -> Part:
        return anchors.reduced(times * total / number.clamp(min=1), number)


@component
class IntraPairVarianceLoss(PairLoss):
    """Keeps similarities close to their mean, those of positives from below and those of negatives from above; added
    to another loss.

        pos_loss[a, p] = relu((1 - pos_eps) * mean of s[a, p] - s[a, p])^2
        neg_loss[a, n] = relu(s[a, n] - (1 + neg_eps) * mean of s[a, n])^2

    with the means over all positive and all negative pairs. For a distance the two are the other way around.

    Yu and Tao, "Deep Metric Learning with Tuplet Margin Loss", ICCV 2019.
    """

    pos_eps: float = 0.01
    neg_eps: float = 0.01
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)

    joins_anchors: ClassVar[bool] = True

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
        mean = _mean_of_negatives(self.distance, embeddings, references, pairs)
        return evaluate(_IntraPairVariance(self, mean), embeddings, references, pairs, [mean])


_FEW = 2**16  # entries of a matrix that is made sooner than the sums that stand for it


def _mean_of_negatives(distance: Distance, embeddings: Tensor, references: References, pairs: Pairs) -> Tensor:
    """The mean distance of all negative pairs, `()`.

    That of products needs no matrix, which only a small one is worth: the sum over all pairs is the product of two
    sums, and so is that over the pairs of each label.
    """
    few = len(embeddings) * len(references) <= _FEW and forced() != "tiled"
    if few or not distance.is_product or not isinstance(pairs, LabelledPairs):
        mean: Tensor = evaluate(_MeanOfNegatives(distance), embeddings, references, pairs)
        return mean
    groups, of_anchor, met, of_met = pairs.groups
    # what gets a gradient is converted once, so that its gradient is rounded once
    given = tuple(p.to(embeddings.dtype) if p.requires_grad else p for p in references.pieces)
    references = replace(references, pieces=given)
    queries = distance.prepare(embeddings).double()
    of_group = queries.new_zeros(groups, queries.shape[1]).index_add(0, of_anchor, queries)
    everything, weight = queries.new_zeros(queries.shape[1]), embeddings.new_ones(len(references))
    for columns, _, _ in references.tiles(room(2**11, embeddings.device)):
        rows, inverse, _ = references.prepared(distance, columns, embeddings.dtype)
        if inverse is not None:
            weight[columns] = inverse.squeeze(1)
        everything = everything + rows.sum(0).double()
    alike = references.sums(met, of_met, weight[met], groups).double()
    sizes = (torch.bincount(group, minlength=groups) for group in (of_anchor, of_met))
    number = len(queries) * len(references) - torch.stack(list(sizes)).prod(0).sum()
    total = queries.sum(0) @ everything - (of_group * alike).sum()
    return (total / number.clamp(min=1)).to(embeddings.dtype) * (number > 0)


class _MeanOfNegatives:
    joins_anchors = False

    def __init__(self, distance: Distance) -> None:
        self.distance, self.reducer = distance, MeanReducer()

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"mean": Each(lambda s: s)}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        return {"mean": anchors.per_negative("mean")}


class _IntraPairVariance:
    joins_anchors = True

    def __init__(self, loss: IntraPairVarianceLoss, mean: Tensor) -> None:
        self.loss, self.distance, self.reducer, self.mean = loss, loss.distance, loss.reducer, mean

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        past = _past(self.loss.neg_eps, not self.distance.is_inverted)
        return {"neg_loss": Each(past, row=self.mean.expand(anchors.size, 1))}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        s, times = anchors.s, anchors.positives.times
        mean = (s * times).sum() / times.sum().clamp(min=1)
        spread = _past(self.loss.pos_eps, self.distance.is_inverted)(s, mean)
        return {"pos_loss": anchors.per_positive(spread), "neg_loss": anchors.per_negative("neg_loss")}


def _past(eps: float, is_low: bool) -> Ramp:
    """The square of how far one lies below (or above) the mean, which is lowered (or raised) by a share `eps`."""
    return Ramp(-1, 0, 1 - eps, power=2) if is_low else Ramp(1, 0, -1 - eps, power=2)
