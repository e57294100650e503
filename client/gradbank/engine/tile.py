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
        squares: `(w,)` how long they are, squared, if that is known.
        shared: whether more than one is to read the distances.

    Attributes:
        s: the distances; they require a gradient if the queries do.
        gathers: whether the queries do.
        kept: whether the tile is, for a second sweep.
    """

    def __init__(
        self,
        distance: Distance,
        queries: Tensor,
        rows: Tensor,
        squares: Tensor | None,
        shared: bool,
        kept: bool,
    ) -> None:
        self.distance, self.queries, self.rows, self.shared, self.kept = distance, queries, rows, shared or kept, kept
        self.gathers = queries.requires_grad
        with torch.set_grad_enabled(self.gathers and not distance.knows_pull):
            self._graph = distance.tile(queries, rows, squares).contiguous()
        self.s = self._graph.detach().requires_grad_(self.gathers)

    def own(self, times: float, plus: Tensor) -> Tensor:
        """`times * s + plus`, to be written to: in place where the distances are read no more, not even by their
        gradient."""
        held, s = self.gathers and self.distance.gradient_reads_matrix, self.s.detach()
        return torch.add(plus, s, alpha=times, out=None if self.shared or held else s)

    def pull(self, of_s: Tensor, few: bool) -> Tensor:
        """What the `(b, w)` gradient of `s`, which may be written to, comes to at the queries: `(b, D)`.

        Args:
            few: whether many references may get nothing; then only the others are multiplied.
        """
        if few and self._mostly_zero(of_s[:8]):
            live = (of_s.amax(0).abs() + of_s.amin(0).abs()).nonzero().squeeze(1)
            if not len(live):
                return torch.zeros_like(self.queries)
            if len(live) * 4 < of_s.shape[1]:
                s = self.s.index_select(1, live) if self.distance.gradient_reads_matrix else self.s
                return self._pulled(self.rows.index_select(0, live), s, of_s.index_select(1, live))
        return self._pulled(self.rows, self.s, of_s)

    def _pulled(self, rows: Tensor, s: Tensor, of_s: Tensor) -> Tensor:
        if self.distance.knows_pull:
            return self.distance.pull(self.queries.detach(), rows, s.detach(), of_s)[0]
        if rows is not self.rows:
            return torch.autograd.grad(self.distance.matrix(self.queries, rows), self.queries, of_s)[0].contiguous()
        return torch.autograd.grad(self._graph, self.queries, of_s, retain_graph=True)[0].contiguous()

    def _mostly_zero(self, of_some: Tensor) -> bool:
        """Whether less than a quarter of the references get a gradient of a few anchors: so perhaps of all."""
        if int(of_some.count_nonzero()) * 4 >= of_some.numel():  # as is soon said
            return False
        return int(of_some.abs().amax(0).count_nonzero()) * 4 < of_some.shape[1]
