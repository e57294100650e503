"""Losses that ask a fixed margin of every pair."""

from collections.abc import Mapping
from dataclasses import field

from torch import Tensor, relu

from gradbank.component import component
from gradbank.engine import Anchors, Reduced, Statistic
from gradbank.losses.base import PairLoss
from gradbank.reducers import AvgNonZeroReducer, Ratio, Reducer


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

    def negatives(self) -> Mapping[str, Statistic]:
        return {"near": Reduced(self._too_near, self.reducer)}

    def _too_near(self, s: Tensor) -> Tensor:
        return relu(self.distance.margin(self.neg_margin, s))

    def terms(self, anchors: Anchors) -> Mapping[str, Ratio]:
        s, _, times = anchors.positives
        return {
            "pos_loss": self.reducer(relu(self.distance.margin(s, self.pos_margin)), times),
            "neg_loss": anchors.found["near"].ratio(),
        }
