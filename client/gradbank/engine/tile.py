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
        shared: whether more than one is to read the distances.

    Attributes:
        s: the distances; they require a gradient if the queries do.
        gathers: whether the queries do.
    """

    def __init__(self, distance: Distance, queries: Tensor, rows: Tensor, shared: bool = True) -> None:
        self.distance, self.queries, self.rows, self.shared = distance, queries, rows, shared
        self.gathers = queries.requires_grad
        with torch.set_grad_enabled(self.gathers):
            self._graph = distance.matrix(queries, rows)
        self.s = self._graph.detach().requires_grad_(self.gathers)

    def own(self, times: float) -> Tensor:
        """The distances, multiplied, to be written to: in place where they are read no more, not even by their
        gradient."""
        held = self.gathers and self.distance.gradient_reads_matrix
        return self.s.detach() * times if self.shared or held else self.s.detach().mul_(times)

    def pull(self, of_s: Tensor, few: bool) -> Tensor:
        """What the `(b, w)` gradient of `s` comes to at the queries: `(b, D)`.

        Args:
            few: whether many references may get nothing; then only the others are multiplied.
        """
        if few and self._mostly_zero(of_s[:8]):
            live = of_s.abs().sum(0).nonzero().squeeze(1)
            if not len(live):
                return torch.zeros_like(self.queries)
            if len(live) * 4 < of_s.shape[1]:
                some = self.distance.matrix(self.queries, self.rows[live])
                return torch.autograd.grad(some, self.queries, of_s[:, live])[0]
        return torch.autograd.grad(self._graph, self.queries, of_s, retain_graph=True)[0]

    def _mostly_zero(self, of_some: Tensor) -> bool:
        """Whether less than a quarter of the references get a gradient of a few anchors: so perhaps of all."""
        return int(of_some.abs().amax(0).count_nonzero()) * 4 < of_some.shape[1] if len(of_some) else False
