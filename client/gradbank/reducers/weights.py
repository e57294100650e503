"""Reducers that go by what comes with the losses: the classes of their anchors, or a divisor."""

from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor

from gradbank.component import component
from gradbank.reducers.base import Reducer, Tally
from gradbank.reducers.kept import Kept, Ratio


@component
class ClassWeightedReducer(Reducer):
    """The mean of the losses, each times the weight of its anchor's class.

        sum_i weights[label of the anchor of i] * loss[i] / number of losses

    Args:
        weights: `(C,)`; labels must be in `0 .. C - 1`.

    Raises:
        ValueError: weights of another shape; no labels, or labels outside that range, when it is called.
    """

    reduces_alike: ClassVar[bool] = False

    weights: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Tensor):
            raise TypeError(
                f"weights must be a tensor, got {type(self.weights).__name__}: torch.tensor(...) makes it one"
            )
        if self.weights.ndim != 1:
            raise ValueError(f"weights must be (C,), one for each class, got shape {tuple(self.weights.shape)}")

    def combine(self, kept: Kept) -> Ratio:
        labels = kept.labels
        if labels is None:
            raise ValueError("ClassWeightedReducer weighs losses by their anchor's label: pass labels to the loss")
        if labels.is_floating_point():
            raise ValueError(f"ClassWeightedReducer needs integer labels, got {labels.dtype}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.weights):
            raise ValueError(
                f"ClassWeightedReducer has weights for the labels 0..{len(self.weights) - 1}, got labels "
                f"{int(labels.min())}..{int(labels.max())}"
            )
        weights = self.weights.to(kept.sums)[labels]
        return Ratio((kept.sums * weights).sum(), kept.counts.sum(dtype=torch.float64))


@component
class DivisorReducer(Reducer):
    """The sum of the losses over the divisor that the loss itself gives, as `MarginLoss` and `ProxyAnchorLoss` do.

    A number is the divisor of all anchors; a tensor is that of the anchors it was made of, and those of several blocks
    are added up.

    Attributes:
        divisor: with `collect_stats`, what the last call divided by.

    Raises:
        ValueError: a loss that gives none, when it is called.
    """

    reduces_alike: ClassVar[bool] = False

    divisor: float | None = field(default=None, init=False)

    def tallies(self) -> list[tuple[Reducer, Tally]]:
        if not self.collect_stats:
            return []
        divisor = Tally(self, ["divisor"], measure=lambda kept: Ratio(self._divisor(kept), None))
        return [*super().tallies(), (divisor, divisor)]

    def combine(self, kept: Kept) -> Ratio:
        total, divisor = kept.sums.sum(dtype=torch.float64), self._divisor(kept)
        # a number is that of all anchors, and what is made of some of them is divided by it now
        whole = not isinstance(kept.divisor, Tensor) and bool(kept.divisor)
        return Ratio(total / divisor, None) if whole else Ratio(total, divisor)

    def _divisor(self, kept: Kept) -> Tensor:
        if kept.divisor is None:
            raise ValueError("DivisorReducer needs a loss that gives a divisor (MarginLoss or ProxyAnchorLoss do)")
        return torch.as_tensor(kept.divisor, dtype=torch.float64, device=kept.sums.device)
