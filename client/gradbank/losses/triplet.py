"""Losses over triplets: an anchor, a positive and a negative."""

from collections.abc import Mapping
from dataclasses import field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn, relu

from gradbank.component import component, foundation
from gradbank.engine import (
    Anchors,
    Hinge,
    LabelledPairs,
    Pairs,
    Part,
    Ramp,
    References,
    Separable,
    Statistic,
    Triplets,
    check_indices,
    every_pair,
    triplets_of,
)
from gradbank.losses.by_pair import swapped, swapped_triplets
from gradbank.losses.pair import PairLoss, softplus
from gradbank.reducers import AvgNonZeroReducer, DivisorReducer, Reducer

_MOST_DRAWN = 10**6  # triplets of an anchor


@foundation
class TripletLoss(PairLoss):
    """A loss whose triplets may also be listed, one by one, or drawn, in place of all that the labels make."""

    if TYPE_CHECKING:
        triplets_per_anchor: int | Literal["all"]  # an argument of each subclass, at a place of its own

    def keeps_triplets(self, embeddings: Tensor, references: References, labels: Tensor | None) -> bool:
        return True

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
        if self.triplets_per_anchor == "all" or not isinstance(pairs, LabelledPairs):
            return super().compare(embeddings, references, pairs)
        drawn = pairs.draw(int(self.triplets_per_anchor))
        return self.compare_listed(embeddings, references, drawn, pairs.anchor_labels)

    def check_triplets_per_anchor(self, number: int | str) -> None:
        """Refuses, by ValueError, what is neither "all" nor a number from 1 to a million."""
        if number != "all" and (isinstance(number, str) or not 1 <= number <= _MOST_DRAWN):
            raise ValueError(f'triplets_per_anchor must be "all" or a number from 1 to {_MOST_DRAWN:,}, got {number!r}')


@component
class TripletMarginLoss(TripletLoss):
    """Asks that an anchor's positive be closer than its negative, by a margin.

        loss[a, p, n] = relu(d[a, p] - d[a, n] + margin)

    over all triplets, exactly, without making them: see `gradbank.engine.hinge`. With a similarity in place of a
    distance the difference changes sign.

    Args:
        margin: by how much.
        swap: whether the positive's distance to the negative takes the place of the anchor's where it is smaller.
        smooth_loss: `log(1 + exp(...))` in place of `relu(...)`.
        triplets_per_anchor: how many triplets of each anchor to draw at random (from torch's generator), or "all".

    Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and Clustering", CVPR 2015.
    """

    margin: float = 0.05
    swap: bool = False
    smooth_loss: bool = False
    triplets_per_anchor: int | Literal["all"] = "all"
    reducer: Reducer = field(default_factory=AvgNonZeroReducer, kw_only=True)

    def __post_init__(self) -> None:
        self.check_triplets_per_anchor(self.triplets_per_anchor)

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
        if not self.swap or (self.triplets_per_anchor != "all" and isinstance(pairs, LabelledPairs)):
            return super().compare(embeddings, references, pairs)
        if not isinstance(pairs, LabelledPairs) or self.reducer.needs_list:
            listed = triplets_of(every_pair(pairs, len(embeddings), references))
            return self.compare_listed(embeddings, references, listed, pairs.anchor_labels)
        return swapped(self, embeddings, references, pairs, self.cost)

    @property
    def takes_interval(self) -> bool:
        whole = self.triplets_per_anchor == "all" and not self.reducer.needs_list  # which lists what there is
        return whole and not self.swap and not self.smooth_loss

    def of_triplets(
        self, embeddings: Tensor, references: References, triplets: tuple[Tensor, Tensor, Tensor], labels: Tensor | None
    ) -> Any:
        if not self.swap:
            return super().of_triplets(embeddings, references, triplets, labels)
        return swapped_triplets(self, embeddings, references, triplets, labels, self.cost)

    def cost(self, near: Tensor, far: Tensor) -> Tensor:
        """What triplets cost whose positives are `near` and whose negatives are `far`."""
        violation = self.distance.margin(near, far) + self.margin
        cost: Tensor = softplus(violation) if self.smooth_loss else relu(violation)
        return cost

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        if self.smooth_loss:
            return {"loss": Triplets(self.cost)}
        return {"loss": Hinge(-self.distance.sign, self.margin, anchors.interval)}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        return {"loss": anchors.per_triplet("loss")}


@component
class MarginLoss(TripletLoss):
    """Asks positives to be nearer than a boundary, and negatives to be farther, each by a margin.

        margin_loss[a, p, n] = relu(d[a, p] - beta + margin) + relu(beta - d[a, n] + margin)
        beta_reg_loss[a, p, n] = beta * nu,   if beta is learned

    The divisor of both is the number of terms above 0 among those of the triplets. One beta for all is no loss of each
    triplet: its part is `beta * nu`, once and undivided.

    Args:
        margin: by how much.
        nu: what the regularization of a learned beta is multiplied by.
        beta: the boundary, at first.
        triplets_per_anchor: how many triplets of each anchor to draw at random, or "all".
        learn_beta: whether `beta` is a parameter.
        num_classes: C, for a boundary of each class, by the anchor's label; None is one for all.

    Attributes:
        beta: `(1,)` or `(C,)`, a parameter if it is learned.

    Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017.
    """

    margin: float = 0.2
    nu: float = 0.0
    beta: Any = field(default=1.2, metadata={"weight": True})
    triplets_per_anchor: int | Literal["all"] = "all"
    learn_beta: bool = False
    num_classes: int | None = None
    reducer: Reducer = field(default_factory=DivisorReducer, kw_only=True)

    def __post_init__(self) -> None:
        self.check_triplets_per_anchor(self.triplets_per_anchor)
        self._first_beta = float(self.beta)
        beta = torch.full((self.num_classes or 1,), self._first_beta)
        self.beta = nn.Parameter(beta) if self.learn_beta else beta

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "beta": self._first_beta}

    def _row(self, anchors: Anchors) -> Tensor:
        """`(b, 1)`: each anchor's boundary."""
        beta: Tensor = self.beta.to(anchors.embeddings)
        if len(beta) == 1:
            return beta.expand(anchors.size, 1)
        if anchors.labels is None:
            raise ValueError("MarginLoss with num_classes has a beta for each label: pass labels")
        if anchors.labels.is_floating_point():
            raise ValueError(f"MarginLoss with num_classes needs integer labels, got {anchors.labels.dtype}")
        check_indices("label", anchors.labels, len(beta))
        return beta.index_select(0, anchors.labels.long())[:, None]

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        sign = self.distance.sign
        too_far = Ramp(-sign, self.margin, sign)
        too_near = Ramp(sign, self.margin, -sign)
        return {"margin_loss": Separable(too_far, too_near, self._row(anchors))}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        extra = anchors.found["margin_loss"].extra
        assert extra is not None
        divisor, triplets = extra[:, 0].sum(), extra[:, 1]
        loss = anchors.per_triplet("margin_loss", divisor)
        if not self.learn_beta:
            return {"margin_loss": loss}
        if len(self.beta) == 1:
            return {"margin_loss": loss, "beta_reg_loss": anchors.reduced(self.beta.sum() * self.nu, triplets.sum())}
        cost = Part("element", self._row(anchors).squeeze(1) * self.nu, triplets, divisor=divisor)
        return {"margin_loss": loss, "beta_reg_loss": cost}
