"""Reducers to a mean or a sum of the losses that count."""

from collections.abc import Mapping
from dataclasses import field
from typing import ClassVar

import torch

from gradbank.component import component, foundation
from gradbank.reducers.base import Reducer
from gradbank.reducers.kept import Bounds, Kept, Ratio


@component
class MeanReducer(Reducer):
    """The mean over every loss."""


@component
class SumReducer(Reducer):
    """The sum of every loss."""

    def combine(self, kept: Kept) -> Ratio:
        return Ratio(kept.sums.sum(dtype=torch.float64), None)


@foundation
class BoundedReducer(Reducer):
    """A mean over the losses that lie between bounds of which there is at least one.

    Attributes:
        num_past_filter: with `collect_stats`, how many losses lie between the bounds.
        num_above_low, num_below_high: how many are above the lower one, and below the upper one; 0 where there is none.
    """

    reduces_alike: ClassVar[bool] = False
    num_past_filter: int | None = field(default=None, init=False)
    num_above_low: int | None = field(default=None, init=False)
    num_below_high: int | None = field(default=None, init=False)

    def counts(self) -> Mapping[str, Bounds]:
        low, high = self.bounds
        made: dict[str, Bounds] = {"num_past_filter": (low, high)}
        if low is not None:
            made["num_above_low"] = low, None
        if high is not None:
            made["num_below_high"] = None, high
        return {**super().counts(), **made}


@component
class ThresholdReducer(BoundedReducer):
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
    def bounds(self) -> Bounds:
        return self.low, self.high


@component
class AvgNonZeroReducer(BoundedReducer):
    """The mean over the losses above 0: `ThresholdReducer(low=0)`."""

    @property
    def bounds(self) -> Bounds:
        return 0.0, None
