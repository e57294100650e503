"""Functions of a tile, of whose derivatives enough is known to spare a graph."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Elementwise = Callable[..., Tensor]


class Linear:
    """`slope * s + intercept`: a function whose derivative is the same everywhere, so that it need not be computed
    everywhere."""

    def __init__(self, slope: float, intercept: float = 0.0) -> None:
        self.slope, self.intercept = slope, intercept

    def __call__(self, s: Tensor) -> Tensor:
        return s * self.slope + self.intercept


class Ramp:
    """`max(0, slope * s + row_slope * row + intercept) ^ power`, whose derivative is known where its base is.

    Args:
        power: 1 or 2.
    """

    def __init__(self, slope: float, intercept: float = 0.0, row_slope: float = 0.0, power: int = 1) -> None:
        self.slope, self.intercept, self.row_slope, self.power = slope, intercept, row_slope, power

    def __call__(self, s: Tensor, *row: Tensor) -> Tensor:
        base = torch.add(self.offset(s, *row), s, alpha=self.slope).relu()
        return base if self.power == 1 else base.square()

    @property
    def is_learned(self) -> bool:
        """Whether it is a function of what is to have a gradient, too."""
        given = (self.slope, self.intercept, self.row_slope)
        return any(isinstance(each, Tensor) and each.requires_grad for each in given)

    def offset(self, like: Tensor, *row: Tensor) -> Tensor:
        """What is the same for all numbers of a row."""
        if row:
            return row[0] * self.row_slope + self.intercept
        given = self.intercept
        if isinstance(given, Tensor):
            return given.to(like)
        most = torch.finfo(like.dtype).max  # beyond which torch takes infinity alone
        return like.new_full((), given if not abs(given) > most else math.copysign(math.inf, given))


class Sloped:
    """A function given along with its derivative, so that autograd need not find that. It may depend on no parameter.

    Args:
        both: from a tensor without a graph to the values and the slopes, new tensors both.
    """

    def __init__(self, both: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.both = both

    def __call__(self, s: Tensor) -> Tensor:
        values, slopes = self.both(s.detach())
        return values + (s - s.detach()) * slopes
