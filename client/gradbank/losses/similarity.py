"""Losses that weigh pairs by their own similarity."""

from collections.abc import Mapping
from dataclasses import field
from typing import ClassVar

from torch import Tensor

from gradbank.component import component
from gradbank.distances import CosineSimilarity, Distance
from gradbank.engine import Anchors, LogSumExp, Statistic
from gradbank.losses.base import PairLoss, softplus
from gradbank.reducers import Ratio


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

    def negatives(self) -> Mapping[str, Statistic]:
        return {"near": LogSumExp(self._nearness)}

    def _nearness(self, s: Tensor) -> Tensor:
        return self.beta * self.distance.margin(self.base, s)

    def terms(self, anchors: Anchors) -> Mapping[str, Ratio]:
        far = anchors.logsumexp(self.alpha * self.distance.margin(anchors.positives.s, self.base))
        near = anchors.found["near"].value
        return {"loss": self.reducer(softplus(far) / self.alpha + softplus(near) / self.beta)}
