"""Losses that classify each positive against the anchor's other references."""

from collections.abc import Mapping
from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor

from gradbank.component import component
from gradbank.distances import CosineSimilarity, Distance
from gradbank.engine import Anchors, LogSumExp, Statistic
from gradbank.losses.base import PairLoss, softplus
from gradbank.reducers import AvgNonZeroReducer, Ratio, Reducer


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

    def negatives(self) -> Mapping[str, Statistic]:
        return {"near": LogSumExp(self._logit)}

    def _logit(self, s: Tensor) -> Tensor:
        return self.distance.closeness(s) / self.temperature

    def terms(self, anchors: Anchors) -> Mapping[str, Ratio]:
        s, _, times = anchors.positives
        near = anchors.each(anchors.found["near"].value)
        return {"loss": self.reducer(softplus(near - self._logit(s)), times)}


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

    def negatives(self) -> Mapping[str, Statistic]:
        return {"near": LogSumExp(self._logit)}

    def _logit(self, s: Tensor) -> Tensor:
        return self.distance.closeness(s) / self.temperature

    def terms(self, anchors: Anchors) -> Mapping[str, Ratio]:
        logit = self._logit(anchors.positives.s)
        number = anchors.sum(torch.ones_like(logit))
        positives = torch.where(number > 0, anchors.logsumexp(logit), 0)
        everyone = torch.logaddexp(anchors.found["near"].value, positives)
        loss = everyone - anchors.sum(logit) / number.clamp(min=1)
        return {"loss": self.reducer(torch.where(number > 0, loss, 0))}
