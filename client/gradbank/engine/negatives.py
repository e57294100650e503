"""Which entries of a tile are negatives: all but a few, or those of a mask."""

import math
from typing import Protocol

import torch
from torch import Tensor

_HARMLESS = 0.5  # where there is no negative at all: within every range of distances and of similarities


class Negatives(Protocol):
    """The negatives of a `(b, w)` tile."""

    def logged(self, values: Tensor) -> Tensor:
        """The values, raised by the log of how often each counts, -inf where no negative is; may write to them."""
        ...

    def weighed(self, weight: Tensor) -> Tensor:
        """The floating weights, times how often each counts; may write to them."""
        ...

    def zeroed(self, values: Tensor) -> Tensor:
        """The values, 0 where there is no negative; may write to them."""
        ...

    def beyond(self, values: Tensor) -> Tensor:
        """A copy of the values, the largest float where there is no negative."""
        ...

    def elsewhere(self, values: Tensor, other: Tensor) -> Tensor:
        """The values, with that of `other`, `(b, 1)`, where there is no negative; may write to them."""
        ...

    def times(self) -> Tensor | None:
        """How often each entry counts as a negative, or None where none does more than once."""
        ...

    def inside(self, values: Tensor) -> Tensor:
        """`(b, w)` bool: where there is a negative."""
        ...


def among(values: Tensor, negatives: Negatives) -> Tensor:
    """The values, with some negative's in place of what is none, for a function that need not be finite there, nor its
    derivative, where it is worth nothing."""
    inside = negatives.inside(values)
    least = torch.where(inside, values.detach(), torch.inf).amin(1, keepdim=True) if values.shape[1] else values
    least = torch.where(least.isfinite(), least, least.amin() if least.numel() else 0)  # another anchor's
    return torch.where(inside, values, torch.where(least.isfinite(), least, _HARMLESS))


class Holes:
    """Every entry is a negative, once, but those at these places of the flattened tile, of which these are the rows."""

    def __init__(self, flat: Tensor, row: Tensor) -> None:
        self.flat, self.row = flat, row

    def logged(self, values: Tensor) -> Tensor:
        values.view(-1).index_fill_(0, self.flat, -torch.inf)
        return values

    def weighed(self, weight: Tensor) -> Tensor:
        weight.view(-1).index_fill_(0, self.flat, 0)
        return weight

    def zeroed(self, values: Tensor) -> Tensor:
        return self.weighed(values)

    def beyond(self, values: Tensor) -> Tensor:
        copy = values.clone(memory_format=torch.contiguous_format)
        copy.view(-1).index_fill_(0, self.flat, torch.finfo(values.dtype).max)
        return copy

    def elsewhere(self, values: Tensor, other: Tensor) -> Tensor:
        values.view(-1).index_copy_(0, self.flat, other.view(-1).index_select(0, self.row))
        return values

    def times(self) -> Tensor | None:
        return None

    def inside(self, values: Tensor) -> Tensor:
        every = torch.ones_like(values, dtype=torch.bool, requires_grad=False)
        every.view(-1).index_fill_(0, self.flat, False)
        return every


class Masked:
    """The negatives are where a `(b, w)` mask is true, or as often as it counts."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def logged(self, values: Tensor) -> Tensor:
        if self.mask.dtype == torch.bool:
            return values.masked_fill_(~self.mask, -torch.inf)
        # not by their sum where there is none, for a value may be infinite
        return torch.where(self.mask != 0, values + self.mask.to(values.dtype).log(), -torch.inf)

    def weighed(self, weight: Tensor) -> Tensor:
        return weight.masked_fill_(~self.mask, 0) if self.mask.dtype == torch.bool else weight * self.mask

    def zeroed(self, values: Tensor) -> Tensor:
        return values.masked_fill_(self.mask == 0, 0)

    def beyond(self, values: Tensor) -> Tensor:
        return values.masked_fill(self.mask == 0, torch.finfo(values.dtype).max)

    def elsewhere(self, values: Tensor, other: Tensor) -> Tensor:
        return torch.where(self.mask != 0, values, other)

    def number(self) -> Tensor:
        """`(b,)` float64: how many negatives each row of the tile has."""
        return self.mask.sum(1, dtype=torch.float64)

    def times(self) -> Tensor | None:
        return None if self.mask.dtype == torch.bool else self.mask

    def inside(self, values: Tensor) -> Tensor:
        return self.mask if self.mask.dtype == torch.bool else self.mask > 0


class Weighted:
    """The negatives are where a `(b, w)` weight is 1; elsewhere it is 0."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def logged(self, values: Tensor) -> Tensor:
        if is_finite(values):
            return values.add_(self.weight.log())
        return values.masked_fill_(self.weight == 0, -torch.inf)

    def weighed(self, weight: Tensor) -> Tensor:
        return weight.mul_(self.weight)

    def zeroed(self, values: Tensor) -> Tensor:
        if is_finite(values):
            return values.mul_(self.weight)
        return values.masked_fill_(self.weight == 0, 0)

    def beyond(self, values: Tensor) -> Tensor:
        return values.masked_fill(self.weight == 0, torch.finfo(values.dtype).max)

    def elsewhere(self, values: Tensor, other: Tensor) -> Tensor:
        return torch.where(self.weight > 0, values, other)

    def number(self) -> Tensor:
        """`(b,)` float64: how many negatives each row of the tile has."""
        return self.weight.sum(1, dtype=torch.float64)

    def times(self) -> Tensor | None:
        return None

    def inside(self, values: Tensor) -> Tensor:
        return self.weight > 0


def is_finite(values: Tensor) -> bool:
    """Whether arithmetic will do where each number would have to be chosen, which takes several times as long."""
    return values.device.type == "cpu" and math.isfinite(values.sum())
