"""A block of anchors: its two sweeps over the references, and the loss written between them."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from gradbank.distances import Distance
from gradbank.engine.anchors import Anchors, Positives
from gradbank.engine.declaration import Declaration
from gradbank.engine.pairs import Pairs, TilePairs
from gradbank.engine.references import References
from gradbank.engine.statistics import Running
from gradbank.reducers import Ratio


class Block:
    """A block of anchors: its first sweep, the loss written on what that found, and its second sweep."""

    def __init__(
        self,
        loss: Declaration,
        embeddings: Tensor,
        references: References,
        pairs: Pairs,
        rows: slice,
        width: int,
    ) -> None:
        self.loss, self.references, self.pairs, self.rows = loss, references, pairs, rows
        self.width = width
        with torch.enable_grad():
            self.embeddings = embeddings.clone().requires_grad_()
            self.queries = loss.distance.prepare(self.embeddings)
        self.wanted = loss.negatives()
        self.running: dict[str, Running] = {}
        self.listed: list[Tensor] = []  # the positions of each tile's positives, kept for the second sweep

    def terms(self) -> Mapping[str, Ratio]:
        """The loss's terms, differentiable in the positives' distances and the statistics' values."""
        like, size = self.queries.detach(), len(self.embeddings)
        early = None
        if any(statistic.needs_positives for statistic in self.wanted.values()):
            early = self._positives((s, tile) for _, s, tile in self._sweep())
            self.listed.clear()
        self.running = {name: wanted.begin(size, like, early) for name, wanted in self.wanted.items()}

        def first_sweep() -> Iterator[tuple[Tensor, TilePairs]]:
            for _, s, tile in self._sweep():
                for running in self.running.values():
                    running.add(s, tile.negatives)
                yield s, tile

        positives = self._positives(first_sweep())
        found = {name: running.finish() for name, running in self.running.items()}
        weight = self.pairs.anchor_weight
        with torch.enable_grad():
            self.leaves = [positives.s.requires_grad_(), *(f.value.requires_grad_() for f in found.values())]
            anchors = Anchors(size, positives, found, None if weight is None else weight[self.rows])
            return self.loss.terms(anchors)

    def backpropagate(self, goal: Tensor, into: list[Tensor | None]) -> None:
        """Adds the gradient of `goal` to `into`: of the embeddings, then of each piece of references, where wanted."""
        if not goal.requires_grad:
            return
        gradients = torch.autograd.grad(goal, self.leaves, allow_unused=True, retain_graph=True)
        of_positives, *of_statistics = gradients
        spread = {n: g for n, g in zip(self.running, of_statistics) if g is not None}
        done = torch.zeros_like(self.queries)
        queries = self.queries.detach().requires_grad_()
        start = 0
        for flat, (columns, piece, part) in zip(self.listed, self.references.tiles(self.width)):
            stop = start + len(flat)
            target = into[1 + piece]
            with torch.enable_grad():
                rows = self.references.pieces[piece][part].to(queries.dtype).requires_grad_(target is not None)
                s = self.loss.distance.matrix(queries, self.loss.distance.prepare(rows))
                negatives = self.pairs.tile(self.rows, columns).negatives
                outputs = [self.running[n].spread(s, negatives, g) for n, g in spread.items()]
            own = None if of_positives is None else of_positives[start:stop]
            start = stop
            if not outputs and own is None:
                continue
            of_s = _of_tile(s, outputs)
            if own is not None:
                of_s.view(-1).index_add_(0, flat, own)
            made = torch.autograd.grad(s, [queries] if target is None else [queries, rows], of_s)
            done += made[0]
            if target is not None:
                target[part] += made[1]
        if into[0] is not None:
            (chained,) = torch.autograd.grad(self.queries, self.embeddings, done, retain_graph=True)
            into[0][self.rows] += chained

    def _sweep(self) -> Iterator[tuple[slice, Tensor, TilePairs]]:
        yield from sweep(self.loss.distance, self.queries.detach(), self.references, self.pairs, self.rows, self.width)

    def _positives(self, tiles: Iterable[tuple[Tensor, TilePairs]]) -> Positives:
        """The positives of the tiles gone through, in that order."""
        s, anchor, count = [], [], []
        for mat, (flat, counts, _) in tiles:
            s.append(mat.reshape(-1)[flat])
            anchor.append(torch.div(flat, max(mat.shape[1], 1), rounding_mode="floor"))
            count.append(mat.new_ones(len(flat)) if counts is None else counts.to(mat.dtype))
            self.listed.append(flat)
        if not s:
            empty = self.queries.new_zeros(0).detach()
            return Positives(empty, empty.long(), empty)
        return Positives(torch.cat(s), torch.cat(anchor), torch.cat(count))


def _of_tile(s: Tensor, outputs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What `(output, weight)` pairs bring down to the tile, to be added to in place."""
    if not outputs:
        return torch.zeros_like(s)
    (made,) = torch.autograd.grad([output for output, _ in outputs], [s], [weight for _, weight in outputs])
    return made.contiguous()


def sweep(
    distance: Distance, queries: Tensor, references: References, pairs: Pairs, rows: slice, width: int
) -> Iterator[tuple[slice, Tensor, TilePairs]]:
    """The tiles of a block of prepared queries: `(columns, (b, width) distances, pairs)`, without gradients."""
    for columns, piece, part in references.tiles(width):
        with torch.no_grad():
            tile = distance.prepare(references.pieces[piece][part].detach().to(queries.dtype))
            s = distance.matrix(queries, tile)
        yield columns, s, pairs.tile(rows, columns)
