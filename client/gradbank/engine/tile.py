"""A tile: a block of anchors against some of the references."""

import torch
from torch import Tensor

from gradbank.distances import Distance


class Tile:
    """The `(b, w)` distances between queries and references.

    Args:
        distance: what measures them.
        queries: `(b, D)`, prepared; a leaf that requires a gradient if statistics are to gather theirs.
        rows: `(w, D)` references, prepared.

    Attributes:
        s: the distances; they require a gradient if the queries do.
        gathers: whether the queries do.
    """

    def __init__(self, distance: Distance, queries: Tensor, rows: Tensor) -> None:
        self.distance, self.queries, self.rows = distance, queries, rows
        self.gathers = queries.requires_grad
        with torch.set_grad_enabled(self.gathers):
            self._graph = distance.matrix(queries, rows)
        self.s = self._graph.detach().requires_grad_(self.gathers)

    def pull(self, of_s: Tensor, few: bool) -> Tensor:
        """What the `(b, w)` gradient of `s` comes to at the queries: `(b, D)`.

        Args:
            few: whether many references may get nothing; then only the others are multiplied.
        """
        if few:
            live = of_s.detach().abs().sum(0).nonzero().squeeze(1)
            if len(live) * 4 < of_s.shape[1]:
                if not len(live):
                    return torch.zeros_like(self.queries)
                some = self.distance.matrix(self.queries, self.rows[live])
                return torch.autograd.grad(some, self.queries, of_s[:, live])[0]
        return torch.autograd.grad(self._graph, self.queries, of_s, retain_graph=True)[0]
