"""Losses of how an anchor's references are ranked: the average precision, and the negatives before each positive."""

import warnings
from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gradbank.checks import MOST_BINS, check_counts
from gradbank.component import component, foundation
from gradbank.distances import CosineSimilarity, Distance, LpDistance
from gradbank.engine import Anchors, LabelledPairs, Pairs, Part, References, Statistic, evaluate
from gradbank.engine.gaps import Gaps
from gradbank.engine.histogram import Grid, Histogram
from gradbank.engine.ranks import Ranks, ranks_among
from gradbank.losses.pair import PairLoss
from gradbank.mismatch import Mismatch
from gradbank.reducers import MeanReducer, Reducer


@component
class FastAPLoss(PairLoss):
    """One minus the average precision of each anchor's ranking, from soft histograms of its distances.

        h+[a, k], h-[a, k] = how many of the anchor's positives, negatives lie at node k = 0 .. num_bins
        loss[a] = 1 - sum_k h+[a, k] H+[a, k] / (H+[a, k] + H-[a, k]) / number of positives

    where H adds up h over the nodes up to k. The nodes part `[0, 2^power]` evenly, and a distance is shared between
    the two that it lies between. Anchors without a positive have no loss. An `indices_tuple` says how much each
    anchor's loss counts: how often it was named, over the most that any was.

    Args:
        num_bins: into how many bins the distances are sorted.

    Raises:
        ValueError: a distance other than `LpDistance(p=2)` of normalised embeddings, or what are not 1 to 10,000 bins.

    Cakir et al., "Deep Metric Learning to Rank", CVPR 2019.
    """

    num_bins: int = 10
    distance: Distance = field(default_factory=lambda: LpDistance(power=2), kw_only=True)

    takes_references: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    use_of_indices: ClassVar = "weights"

    def __post_init__(self) -> None:
        self.require_distance(LpDistance, normalize_embeddings=True, p=2)
        self.num_bins = int(self.num_bins)
        check_counts(self, "num_bins", most=MOST_BINS)

    def _grid(self) -> Grid:
        return Grid(0.0, 2**self.distance.power / self.num_bins, self.num_bins)

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"histogram": Histogram(self._grid())}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        positives = anchors.positives
        mine = self._grid().histogram(positives.s, positives.anchor, anchors.size, positives.times)
        nearer = mine.cumsum(1)
        everyone = nearer + anchors.found["histogram"].value.cumsum(1)
        precision = mine * nearer / torch.where(everyone == 0, 1, everyone)
        number = anchors.number()
        loss = 1 - precision.sum(1) / number.clamp(min=1)
        return {"loss": anchors.per_anchor(torch.where(number > 0, loss, 0), kept=number > 0)}


@component
class RankedListLoss(PairLoss):
    """Gathers positives within a ball and keeps negatives out of a larger one, the worst of both weighing most.

        loss[a] = (1 - imbalance) * sum_p w_p (d[a, p] - (alpha - margin)) / (sum_p w_p + 1e-5 B)
                +      imbalance  * sum_n w_n (alpha - d[a, n])            / (sum_n w_n + 1e-5 B)
        w_p = exp(Tp (d[a, p] - (alpha - margin))),   w_n = exp(Tn (alpha - d[a, n]))

    with p over the positives with `d > alpha - margin`, n over the negatives with `d < alpha`, both with `d > 0`.

    Args:
        margin: between the two balls.
        Tn, Tp: how much more the worst negatives and positives weigh; 0 is alike.
        imbalance: between the two sums, from 0 to 1.
        alpha: the distance that negatives are to be kept at; None is `1 + margin / 2`.

    Raises:
        ValueError: an imbalance that is not from 0 to 1.

    Wang et al., "Ranked List Loss for Deep Metric Learning", CVPR 2019.
    """

    margin: float
    Tn: float
    imbalance: float = 0.5
    alpha: float | None = None
    Tp: float = 0

    takes_references: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    use_of_indices: ClassVar = "refused"

    def __post_init__(self) -> None:
        if not 0 <= self.imbalance <= 1:
            raise Mismatch(f"imbalance must be between 0 and 1, got {self.imbalance}")
        if self.Tp > 5 or self.Tn > 5:
            warnings.warn(f"Tp={self.Tp} and Tn={self.Tn}: above 5, the weights may overflow", stacklevel=3)
        self.alpha = 1 + self.margin / 2 if self.alpha is None else self.alpha

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        assert self.alpha is not None  # since it was built
        return {"near": Gaps(self.alpha, self.Tn)}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        assert self.alpha is not None
        excess = (anchors.s - (self.alpha - self.margin)).clamp(min=0)
        # weights are relative to the anchor's largest: of a far positive, the exponential alone may be infinite
        most = anchors.largest(self.Tp * excess).clamp(min=0)
        weight = (self.Tp * excess - anchors.each(most)).exp() * ((excess > 0) & (anchors.s > 0))
        far = [anchors.sum(x) for x in (weight, weight * excess)]
        near, others = anchors.found["near"][:2]
        assert others is not None
        least = 1e-5 * (anchors.number() + others + 1)  # of the B rows, the anchor itself among them
        losses = (1 - self.imbalance) * far[1] / (far[0] + least * (-most).exp()) + self.imbalance * near[:, 1] / (
            near[:, 0] + least
        )
        return {"loss": anchors.per_anchor(losses)}


@foundation
class RankLoss(PairLoss):
    """A loss of the soft ranks of an anchor's class, of which the anchor itself is one.

    Anchors that are alone in their class have no loss.
    """

    takes_references: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def with_own(self, pairs: Pairs) -> LabelledPairs:
        """The pairs that labels make, with each anchor a positive of itself."""
        assert isinstance(pairs, LabelledPairs)  # neither lists nor queues are taken
        return LabelledPairs(pairs.labels, pairs.ref_labels, anchor_weight=pairs.anchor_weight)

    def of_positives(self, anchors: Anchors, losses: Tensor) -> Part:
        """The part whose losses are the anchors' means of those of their positives, for anchors that are not alone."""
        number = anchors.number()
        return anchors.per_anchor(anchors.sum(losses) / number.clamp(min=1), kept=number > 1)


@component
class SmoothAPLoss(RankLoss):
    """One minus the average precision of each anchor's ranking, from soft ranks.

        loss[a] = 1 - mean_p (1 + sum_q before(p, q)) / (1 + sum_b before(p, b))
        before(p, b) = sigmoid((s[a, b] - s[a, p]) / temperature)

    with p and q over the anchor's class, itself included, and b over all of the batch, each other than p. Anchors that
    are alone in their class have no loss. An `indices_tuple` says how much each anchor's loss counts, as in
    `FastAPLoss`.

    Classes may be of any size and labels in any order. PML wants classes of equal size, and is right only for labels
    that are sorted and for as many classes as each has members.

    Raises:
        ValueError: a distance other than `CosineSimilarity`.

    Brown et al., "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval", ECCV 2020.
    """

    temperature: float = 0.01
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)

    use_of_indices: ClassVar = "weights"

    def __post_init__(self) -> None:
        self.require_distance(CosineSimilarity)

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
        return super().compare(embeddings, references, self.with_own(pairs))

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"before": Ranks(self.temperature)}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        rank = 1 + ranks_among(anchors.positives, anchors.size, self.temperature)
        precision = rank / (rank + anchors.found["before"].value)
        return {"ap_loss": self.of_positives(anchors, 1 - precision)}


@component
class PNPLoss(RankLoss):
    """Penalises the negatives that lie before each positive.

        R[a, p] = sum_n sigmoid((s[a, n] - s[a, p]) / anneal)
        loss = mean_a mean_p penalty(R[a, p])

    with p over the anchor's class, itself included, and a over the anchors that are not alone in theirs. The
    penalty is, by variant,

        O: R      Ds: log(1 + R)      Dq: 1 - (1 + R)^-alpha
        Iu: (1 + R) log(1 + R)        Ib: (b R - log(1 + b R)) / b^2

    Args:
        b: how steep the penalty of variant Ib is.
        alpha: how steep that of Dq is.
        anneal: the temperature.
        variant: "O", "Ds", "Dq", "Iu" or "Ib".

    Raises:
        ValueError: another variant, or a distance other than `CosineSimilarity`.

    Li et al., "Rethinking the Optimization of Average Precision: Only Penalizing Negative Instances before Positive
    Ones is Enough", AAAI 2022.
    """

    b: float = 2
    alpha: float = 1
    anneal: float = 0.01
    variant: Literal["Ds", "Dq", "Iu", "Ib", "O"] = "O"
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)

    VARIANTS: ClassVar = ["Ds", "Dq", "Iu", "Ib", "O"]
    use_of_indices: ClassVar = "refused"

    def __post_init__(self) -> None:
        self.require_distance(CosineSimilarity)
        if self.variant not in self.VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(self.VARIANTS)}, got {self.variant!r}")

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
        value = evaluate(_Penalties(self), embeddings, references, self.with_own(pairs))
        return self.reduced(value, embeddings, pairs.anchor_labels)

    def penalty(self, before: Tensor) -> Tensor:
        """What a positive costs with so many negatives before it."""
        if self.variant == "Ds":
            return before.log1p()
        if self.variant == "Dq":
            return 1 - (1 + before) ** -self.alpha
        if self.variant == "Iu":
            return (1 + before) * before.log1p()
        if self.variant == "Ib":
            return (self.b * before - (self.b * before).log1p()) / self.b**2
        return before


class _Penalties:
    """The mean of the anchors' penalties, whatever the reducer of the loss."""

    joins_anchors = False

    def __init__(self, loss: PNPLoss) -> None:
        self.loss, self.distance = loss, loss.distance
        self.reducer: Reducer = MeanReducer()

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"before": Ranks(self.loss.anneal)}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        return {"loss": self.loss.of_positives(anchors, self.loss.penalty(anchors.found["before"].value))}
