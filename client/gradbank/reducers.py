"""Reducers: from what each pair, triplet or anchor costs to one number.

A reducer is a weighted mean kept as a numerator and a denominator until the end, so that the parts of a
loss that were computed apart (blocks of anchors, tiles of references) can be added up.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gradbank.component import Component, component, foundation


class Ratio(NamedTuple):
    """One named part of a loss, reduced so far."""

    numerator: Tensor  # () float64, differentiable
    denominator: Tensor  # () float64, a constant

    def divisor(self) -> Tensor:
        """The denominator, or 1 where nothing was left to reduce."""
        return torch.where(self.denominator > 0, self.denominator, 1.0)

    def value(self) -> Tensor:
        """What the part is worth: 0 (which backpropagates zeros) where nothing was left to reduce."""
        return self.numerator / self.divisor()

    def plus(self, other: "Ratio") -> "Ratio":
        """The ratio of both parts together."""
        return Ratio(self.numerator + other.numerator, self.denominator + other.denominator)

    def detached(self) -> "Ratio":
        return Ratio(self.numerator.detach(), self.denominator.detach())


@foundation
class Reducer(Component):
    """A mean over the losses that lie strictly between `low` and `high`."""

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The losses that count lie strictly between these; None is no bound."""
        return None, None

    def weigh(self, losses: Tensor, weight: Tensor) -> Tensor:
        """`weight`, with 0 in place of each loss that does not count."""
        low, high = self.bounds
        if low is not None:
            weight = weight * (losses > low)
        if high is not None:
            weight = weight * (losses < high)
        return weight

    def forward(self, losses: Tensor, weight: Tensor | None = None) -> Ratio:
        """Reduces losses of any shape; `weight`, of the same shape, says how often each one counts."""
        weight = self.weigh(losses.detach(), torch.ones_like(losses) if weight is None else weight)
        # a loss that does not count may be infinite, and 0 * inf would be NaN
        counted = torch.where(weight > 0, losses, torch.zeros_like(losses)) * weight
        return Ratio(counted.sum(dtype=torch.float64), weight.sum(dtype=torch.float64))


@component
class MeanReducer(Reducer):
    """The mean over every loss."""


@component
class ThresholdReducer(Reducer):
    """The mean over the losses strictly above `low` and strictly below `high`; 0 if there are none.

    Raises:
        ValueError: neither bound was given.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise ValueError("ThresholdReducer needs at least one of low and high")

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return self.low, self.high


@component
class AvgNonZeroReducer(Reducer):
    """The mean over the losses above 0: `ThresholdReducer(low=0)`."""

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return 0.0, None
