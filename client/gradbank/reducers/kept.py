"""What is left of losses while they are reduced: sums and counts by anchor, then a ratio."""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Bounds = tuple[float | None, float | None]
Kind = Literal["element", "pos_pair", "neg_pair", "triplet", "already_reduced"]
LossDict = Mapping[str, Mapping[str, Any]]


def part_of_each(losses: Tensor, indices: Tensor | None = None, **more: Any) -> dict[str, Any]:
    """The part of a loss whose `(N,)` losses are those of elements: of all in order, or of these."""
    indices = torch.arange(len(losses), device=losses.device) if indices is None else indices
    return {"losses": losses, "indices": indices, "reduction_type": "element", **more}


def part_of_all(losses: Tensor | float) -> dict[str, Any]:
    """The part that is a number already: no reducer asks whether it counts."""
    return {"losses": losses, "indices": None, "reduction_type": "already_reduced"}


class Ratio(NamedTuple):
    """One named part of a loss, reduced so far: a numerator and a denominator, so that the parts of a loss that were
    computed apart (blocks of anchors) can be added up."""

    numerator: Tensor  # () float64, differentiable
    denominator: Tensor | None  # () float64, a constant; None where nothing is divided by

    @staticmethod
    def total(parts: "Iterable[Ratio]") -> Tensor:
        """What several parts are worth together."""
        return reduce(torch.add, (part.value() for part in parts))

    def value(self) -> Tensor:
        """What the part is worth: 0 (which backpropagates zeros) where there is nothing to divide by."""
        if self.denominator is None:
            return self.numerator
        some = self.denominator != 0
        # what is no number stays none
        return torch.where(some, self.numerator / torch.where(some, self.denominator, 1.0), self.numerator * 0)

    def plus(self, other: "Ratio") -> "Ratio":
        """The ratio of both parts together."""
        if self.denominator is None or other.denominator is None:
            return Ratio(self.numerator + other.numerator, None)
        return Ratio(self.numerator + other.numerator, self.denominator + other.denominator)


class Kept(NamedTuple):
    """The losses that count, added up by anchor."""

    sums: Tensor  # (b,), differentiable
    counts: Tensor  # (b,), a constant: how many losses each sum is made of
    kind: Kind
    labels: Tensor | None = None  # (b,) the anchors'
    divisor: Tensor | float | None = None  # what the loss itself would divide by


class Weighing(Protocol):
    """What says which losses count: a reducer."""

    @property
    def bounds(self) -> Bounds:
        """The losses that count lie strictly between these; None is no bound."""
        ...

    def weigh(self, losses: Tensor, weight: Tensor | None = None) -> Tensor:
        """`weight` (None is 1), with 0 in place of each loss that does not count."""
        ...


def counted(losses: Tensor, weight: Tensor) -> Tensor:
    """The losses times their weights. A loss that does not count may be infinite, and 0 * inf would be NaN."""
    return torch.where(weight > 0, losses, torch.zeros_like(losses)) * weight


def add_up(
    reducer: Weighing,
    kind: Kind,
    losses: Tensor,
    times: Tensor | None,
    anchor: Tensor | None,
    size: int,
    labels: Tensor | None = None,
    divisor: Tensor | float | None = None,
) -> Kept:
    """The `(N,)` losses that count for `reducer`, added up by anchor.

    Args:
        times: `(N,)` how often each one counts, or None for once.
        anchor: `(N,)` whose loss each one is, in `0 .. size - 1`, or None where the losses are one per anchor.
    """
    if times is None and reducer.bounds == (None, None):  # all of them count, once
        sums, counts = losses.double(), torch.ones_like(losses, dtype=torch.float64)
    else:
        weight = reducer.weigh(losses.detach(), times)
        sums, counts = counted(losses, weight).double(), weight.double()
    if anchor is not None:
        sums, counts = (x.new_zeros(size).index_add(0, anchor, x) for x in (sums, counts))
    return Kept(sums, counts, kind, labels, divisor)
