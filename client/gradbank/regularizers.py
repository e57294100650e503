"""Regularizers: a cost of the embeddings (or weights) themselves, whatever their labels."""

from dataclasses import field

import torch
from torch import Tensor

from gradbank.component import Component, component, foundation
from gradbank.reducers import MeanReducer, Ratio, Reducer


@foundation
class Regularizer(Component):
    """A cost per row, reduced to one number."""

    reducer: Reducer = field(default_factory=MeanReducer, kw_only=True)

    def costs(self, rows: Tensor) -> Tensor:
        """What each of the `(N, D)` rows costs: `(N,)`."""
        raise NotImplementedError(f"{type(self).__name__} must define costs")

    def forward(self, rows: Tensor) -> Tensor:
        ratio: Ratio = self.reducer(self.costs(rows))
        value: Tensor = ratio.value().to(rows.dtype)
        return value


@component
class LpRegularizer(Regularizer):
    """Keeps embeddings short: `loss[a] = |x_a|_p ^ power`."""

    p: float = 2
    power: float = 1

    def costs(self, rows: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(rows, ord=self.p, dim=1)
        raised: Tensor = norms if self.power == 1 else norms**self.power
        return raised
