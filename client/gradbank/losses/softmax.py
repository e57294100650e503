"""Losses that classify each positive against the anchor's other references."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradbank.checks import require_positive
from gradbank.component import component
from gradbank.distances import CosineSimilarity, Distance, LpDistance
from gradbank.engine import (
    Anchors,
    Each,
    Linear,
    LogSumExp,
    Pairs,
    Part,
    References,
    Statistic,
    look,
)
from gradbank.losses.pair import PairLoss, softplus
from gradbank.reducers import AvgNonZeroReducer, MeanReducer, MultipleReducers, Reducer, Tally, write


@component
class NTXentLoss(PairLoss):
    """Cross-entropy of each positive against all of its anchor's negatives (InfoNCE).

        loss[a, p] = -log(e(a, p) / (e(a, p) + sum_n e(a, n))),   e(a, b) = exp(s[a, b] / temperature)
                   = softplus(log sum_n e(a, n) - s[a, p] / temperature)

    The anchor's other positives are left out of the denominator: `SupConLoss` has them in.

    Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016;
    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020.
    """

    temperature: float = 0.07
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)

    def __post_init__(self) -> None:
        require_positive(temperature=self.temperature)

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"near": LogSumExp(self._logit)}

    @property
    def _logit(self) -> Linear:
        return Linear(self.distance.sign / self.temperature)

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        near = anchors.each(anchors.found["near"].value)
        return {"loss": anchors.per_positive(softplus(near - self._logit(anchors.s)))}


@component
class SupConLoss(PairLoss):
    """Cross-entropy of each positive against all of its anchor's references, averaged by anchor.

        loss[a] = -mean_p log(e(a, p) / sum_b e(a, b)),   e(a, b) = exp(s[a, b] / temperature)

    with b over the anchor's positives and negatives. An anchor without positives costs 0.

    Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020.
    """

    temperature: float = 0.1
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)
    reducer: Reducer = field(default_factory=AvgNonZeroReducer, kw_only=True)

    counts_repeats: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_positive(temperature=self.temperature)

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"near": LogSumExp(self._logit)}

    @property
    def _logit(self) -> Linear:
        return Linear(self.distance.sign / self.temperature)

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        logit, number = self._logit(anchors.s), anchors.number()
        positives = torch.where(number > 0, anchors.logsumexp(logit), 0)
        everyone = torch.logaddexp(anchors.found["near"].value, positives)
        loss = everyone - anchors.sum(logit) / number.clamp(min=1)
        return {"loss": anchors.per_anchor(torch.where(number > 0, loss, 0))}


@component
class NCALoss(PairLoss):
    """How unlikely an anchor is to choose one of its class when it chooses a neighbour at random.

        loss[a] = -log(sum_p e(a, p) / sum_b e(a, b)),   e(a, b) = exp(-softmax_scale * d[a, b])

    with b over all references; anchors without a positive have no loss. `SupConLoss` averages the logarithms of the
    positives, this one takes the logarithm of their sum.

    With `ref_emb` or in a queue, as in PML, an anchor's own row is one of its positives. An `indices_tuple` says how
    much each anchor's loss counts: how often it was named, over the most that any was.

    Goldberger et al., "Neighbourhood Components Analysis", NIPS 2004.
    """

    softmax_scale: float = 1.0
    distance: Distance = field(default_factory=lambda: LpDistance(power=2), kw_only=True)

    needs_labels: ClassVar[bool] = True
    sees_own: ClassVar[bool] = True
    use_of_indices: ClassVar = "weights"

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"near": LogSumExp(self._logit)}

    @property
    def _logit(self) -> Linear:
        return Linear(self.distance.sign * self.softmax_scale)

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        some = anchors.number() > 0
        positives = torch.where(some, anchors.logsumexp(self._logit(anchors.s)), 0)
        loss = softplus(anchors.found["near"].value - positives)
        return {"loss": anchors.per_anchor(torch.where(some, loss, 0), kept=some)}


@component
class TupletMarginLoss(PairLoss):
    """`NTXentLoss` on angles, with a margin that is taken off each positive's.

        loss[a, p] = log(1 + sum_n exp(scale * (cos t[a, n] - cos(t[a, p] - margin))))

    where t is the angle between two embeddings.

    Args:
        margin: in degrees.
        scale: the inverse temperature.

    Attributes:
        avg_pos_angle, avg_neg_angle: with `collect_stats`, the mean angles of the positive and of the negative pairs,
            in degrees; 0 if there are none.

    Raises:
        ValueError: a distance other than `CosineSimilarity`.

    Yu and Tao, "Deep Metric Learning with Tuplet Margin Loss", ICCV 2019.
    """

    margin: float = 5.73
    scale: float = 64.0
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)
    avg_pos_angle: float | None = field(default=None, init=False)
    avg_neg_angle: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.require_distance(CosineSimilarity)

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
        value = super().compare(embeddings, references, pairs)
        if self.collect_stats:
            angles = _Angles(self)
            look(angles, embeddings, references, pairs)
            write(angles.tallies)
        return value

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"near": LogSumExp(Linear(self.scale))}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        nearer = (angle(anchors.s) - radians(self.margin)).cos() * self.scale
        return {"loss": anchors.per_positive(softplus(anchors.each(anchors.found["near"].value) - nearer))}


class _Angles:
    """The angles of all pairs, as the losses of two parts whose means are statistics of `loss`."""

    joins_anchors = False

    def __init__(self, loss: TupletMarginLoss) -> None:
        names = ("avg_pos_angle", "avg_neg_angle")
        self.tallies = [Tally(loss, [name], measure=MeanReducer().combine) for name in names]
        self.distance: Distance = loss.distance
        self.reducer: Reducer = MultipleReducers(dict(zip(names, self.tallies)))

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"avg_neg_angle": Each(degrees)}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        return {
            "avg_pos_angle": anchors.per_positive(degrees(anchors.s)),
            "avg_neg_angle": anchors.per_negative("avg_neg_angle"),
        }


def radians(degrees: float | Tensor) -> Tensor:
    """Of an argument, which may be learned."""
    # a number's is on the host, whatever torch's default device is
    given = degrees if isinstance(degrees, Tensor) else torch.tensor(degrees, dtype=torch.float64, device="cpu")
    return torch.deg2rad(given.double())


def degrees(cosine: Tensor) -> Tensor:
    """The angle of a cosine, in degrees."""
    return cosine.clamp(-1, 1).acos().rad2deg()


def angle(cosine: Tensor) -> Tensor:
    """The angle of a cosine, in radians. At 1 its derivative would be infinite: a hair below, it is 0 instead."""
    most = 1 - torch.finfo(cosine.dtype).eps
    return cosine.clamp(-most, most).acos()
