"""Triplet losses that are the sum of what the positive costs and what the negative costs."""

import torch
from torch import Tensor

from gradbank.engine.anchors import Gathered, Positives
from gradbank.engine.negatives import Negatives
from gradbank.engine.statistics import Elementwise, Running
from gradbank.engine.tile import Tile
from gradbank.engine.triplets import Triplets
from gradbank.reducers import Reducer


class Separable(Triplets):
    """`of_positive(s_p) + of_negative(s_n)`, both at least 0, over each anchor's triplets.

    The sum over all triplets is the number of negatives times the sum over positives, and the other way around; a
    triplet costs nothing where neither of its two does. So nothing is made but the two sums and four counts, unless a
    reducer asks for other bounds.

    Args:
        of_positive, of_negative: of a tensor, and of the row's broadcast to it if there is one.
        row: `(b, 1)` numbers of the anchors that both also take; they get a gradient.
        plain: whether to leave the reducer out of it, and sum over every triplet.
    """

    needs_positives = False

    def __init__(
        self, of_positive: Elementwise, of_negative: Elementwise, row: Tensor | None = None, plain: bool = False
    ) -> None:
        def kernel(positive: Tensor, negative: Tensor, *row: Tensor) -> Tensor:
            made: Tensor = of_positive(positive, *row) + of_negative(negative, *row)
            return made

        super().__init__(kernel, row)
        self.of_positive, self.of_negative, self.plain = of_positive, of_negative, plain

    def reduced_by(self, reducer: Reducer) -> None:
        if not self.plain:
            super().reduced_by(reducer)
            self.needs_positives = reducer.bounds not in ((None, None), (0.0, None))

    def begin(self, anchors: int, like: Tensor, positives: Positives | None) -> Running:
        if self.needs_positives:
            return super().begin(anchors, like, positives)
        return _RunningSeparable(self, anchors, like)


class _RunningSeparable(Running):
    def __init__(self, separable: Separable, anchors: int, like: Tensor) -> None:
        super().__init__(separable.of_negative, separable.row)
        self.separable = separable
        self.total, self.active, self.number = (like.new_zeros(anchors, dtype=torch.float64) for _ in range(3))

    def add(self, tile: Tile, negatives: Negatives) -> None:
        values = self.values(tile.s)
        weight = negatives.weighed(torch.ones_like(values, requires_grad=False))
        costs = values.detach() * weight
        self.total += costs.sum(1)
        self.number += weight.sum(1)
        self.active += (values.detach().sign() * weight).sum(1)
        if tile.gathers and values.requires_grad:
            self.gather(tile, values, weight, few=True)

    def leaf(self) -> Tensor:
        return self.total

    def gathered(self, leaf: Tensor, positives: Positives) -> Gathered:
        anchor, times = positives.anchor, positives.times.double()
        row = () if self.given is None else (self.given.expand(len(leaf), 1).squeeze(1)[anchor],)
        costs: Tensor = self.separable.of_positive(positives.s, *row)

        def of_anchor(each: Tensor) -> Tensor:
            return torch.zeros_like(self.total).index_add(0, anchor, each * times)

        mine = of_anchor(torch.ones_like(times))
        value = of_anchor(costs.double()) * self.number + leaf * mine
        everything = mine * self.number
        if self.separable.reducer.bounds == (None, None):
            return Gathered(value, everything)
        idle = (mine - of_anchor(costs.detach().sign().double())) * (self.number - self.active)
        return Gathered(value, everything - idle)

    def spread(self, s: Tensor, negatives: Negatives, gradient: Tensor) -> tuple[Tensor, Tensor]:
        values = self.values(s)
        weight = negatives.weighed(torch.ones_like(values, requires_grad=False))
        return values, weight * gradient.to(values.dtype)[:, None]
