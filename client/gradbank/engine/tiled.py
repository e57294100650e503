"""Any loss in bounded memory: blocks of anchors against tiles of references, each tile computed twice.

The first sweep over the references gathers, for a block of anchors, the distances of its positives and the
statistics of its negatives. The loss is then written on those few numbers and differentiated by autograd; the
second sweep computes each tile again and spreads the gradient over it. Value and gradient are computed
together, so nothing but the gradient itself outlives the call: a bank may change before `backward`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbank.distances import Distance
from gradbank.engine.anchors import Anchors, Positives
from gradbank.engine.declaration import Declaration
from gradbank.engine.pairs import Pairs, TilePairs
from gradbank.engine.references import References
from gradbank.engine.statistics import Running


@dataclass(frozen=True)
class Bounds:
    """What a step may hold at a time.

    Attributes:
        tile: entries of the distance matrix in a tile; the default is 2 MiB of float32, about a core's cache.
        rows: anchors in a block, at most.
        positives: positive pairs of a block, at most (a single anchor may exceed it); each takes some 100 bytes.
    """

    tile: int = 2**19
    rows: int = 512
    positives: int = 2**19

    def blocks(self, pairs: Pairs, anchors: int, references: int) -> Iterator[slice]:
        """Blocks of anchors; those of a block have room for as many positives as the richest has."""
        few = anchors * references <= self.positives
        richest = 1 if few else int(pairs.most_positives().max())
        step = max(1, min(self.rows, self.positives // max(richest, 1)))
        for start in range(0, anchors, step):
            yield slice(start, min(start + step, anchors))

    def width(self, rows: slice) -> int:
        height: int = rows.stop - rows.start
        return max(1, self.tile // max(height, 1))


def tiled(
    loss: Declaration,
    embeddings: Tensor,
    references: References,
    pairs: Pairs,
    needed: tuple[bool, ...],
    bounds: Bounds | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The loss of `(B, D)` embeddings and its gradients, in memory that does not grow with `B * M`.

    Args:
        needed: whether a gradient is wanted of the embeddings, and of each piece of the references.
    """
    return _Evaluation(loss, references.labels, pairs, bounds or Bounds())(embeddings, references.pieces, needed)


class _Sums(NamedTuple):
    """A gradient that is waiting for its denominator: of the embeddings, and of each piece of references."""

    embeddings: Tensor
    pieces: list[Tensor | None]


class _Evaluation:
    def __init__(self, loss: Declaration, labels: Tensor | None, pairs: Pairs, bounds: Bounds) -> None:
        self.loss, self.labels, self.pairs, self.bounds = loss, labels, pairs, bounds

    def __call__(
        self, embeddings: Tensor, pieces: tuple[Tensor, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss, and its gradient with respect to each input that needs one."""
        references = References(tuple(p.detach() for p in pieces), self.labels)
        blocks = list(self.bounds.blocks(self.pairs, len(embeddings), len(references)))
        totals: dict[str, list[Tensor]] = {}
        sums: dict[str, _Sums] = {}
        for rows in blocks:
            block = _Block(self.loss, embeddings.detach()[rows], references, self.pairs, rows, self.bounds)
            terms = block.terms()
            for name, (numerator, denominator) in terms.items():
                total = totals.setdefault(name, [torch.zeros_like(denominator), torch.zeros_like(denominator)])
                total[0] += numerator.detach()
                total[1] += denominator
            if not any(needed):
                continue
            if len(blocks) == 1:  # every denominator is known: one gradient will do for all terms
                with torch.enable_grad():
                    goals = {"loss": torch.stack([ratio.value() for ratio in terms.values()]).sum()}
            else:
                goals = {name: ratio.numerator for name, ratio in terms.items()}
            for name, goal in goals.items():
                if name not in sums:
                    sums[name] = _Sums(
                        torch.zeros_like(embeddings),
                        [torch.zeros_like(p) if need else None for p, need in zip(pieces, needed[1:])],
                    )
                block.backpropagate(goal, sums[name].embeddings[rows], sums[name].pieces)
        known = {name: torch.where(den > 0, den, 1.0) for name, (_, den) in totals.items()}
        zero = embeddings.new_zeros((), dtype=torch.float64)
        value = sum((totals[name][0] / known[name] for name in totals), zero).to(embeddings.dtype)
        shares = [(1.0 / known[n]).to(embeddings.dtype) if n in known and len(blocks) > 1 else None for n in sums]
        return value, _weighted(list(sums.values()), shares, embeddings, pieces, needed)


def _weighted(
    sums: list[_Sums],
    shares: list[Tensor | None],
    embeddings: Tensor,
    pieces: tuple[Tensor, ...],
    needed: tuple[bool, ...],
) -> list[Tensor]:
    """The sums, each divided by its denominator and added up: a tensor for each input that needs one."""
    gradients = []
    for i, (source, need) in enumerate(zip((embeddings, *pieces), needed)):
        if not need:
            continue
        parts = [(s.embeddings if i == 0 else s.pieces[i - 1], share) for s, share in zip(sums, shares)]
        scaled = [part if share is None else part.mul_(share) for part, share in parts if part is not None]
        total = scaled[0] if scaled else torch.zeros_like(source)
        for part in scaled[1:]:
            total += part
        gradients.append(total)
    return gradients


class _Block:
    """A block of anchors: its first sweep, the loss written on what that found, and its second sweep."""

    def __init__(
        self,
        loss: Declaration,
        embeddings: Tensor,
        references: References,
        pairs: Pairs,
        rows: slice,
        bounds: Bounds,
    ) -> None:
        self.loss, self.references, self.pairs, self.rows = loss, references, pairs, rows
        self.width = bounds.width(rows)
        with torch.enable_grad():
            self.embeddings = embeddings.clone().requires_grad_()
            self.queries = loss.distance.prepare(self.embeddings)
        self.wanted = loss.negatives()
        self.running: dict[str, Running] = {}
        self.listed: list[Tensor] = []  # the positions of each tile's positives, kept for the second sweep

    def terms(self) -> Any:
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

    def backpropagate(self, goal: Tensor, into: Tensor, pieces: list[Tensor | None]) -> None:
        """Adds the gradient of `goal` to `into`, a `(b, D)` view, and to each of `pieces` that is a tensor."""
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
            target = pieces[piece]
            with torch.enable_grad():
                rows = self.references.pieces[piece][part].to(queries.dtype).requires_grad_(target is not None)
                s = self.loss.distance.matrix(queries, self.loss.distance.prepare(rows))
                negatives = self.pairs.tile(self.rows, columns).negatives
                outputs = [self.running[n].spread(s, negatives, g) for n, g in spread.items()]
                if of_positives is not None and stop > start:
                    outputs.append((s.reshape(-1)[flat], of_positives[start:stop]))
            start = stop
            if not outputs:
                continue
            inputs = [queries] if target is None else [queries, rows]
            made = torch.autograd.grad([o for o, _ in outputs], inputs, [w for _, w in outputs])
            done += made[0]
            if target is not None:
                target[part] += made[1]
        (chained,) = torch.autograd.grad(self.queries, self.embeddings, done, retain_graph=True)
        into += chained

    def _sweep(self) -> Iterator[tuple[slice, Tensor, TilePairs]]:
        yield from sweep(self.loss.distance, self.queries.detach(), self.references, self.pairs, self.rows, self.width)

    def _positives(self, tiles: Any) -> Positives:
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


def sweep(
    distance: Distance, queries: Tensor, references: References, pairs: Pairs, rows: slice, width: int
) -> Iterator[tuple[slice, Tensor, TilePairs]]:
    """The tiles of a block of prepared queries: `(columns, (b, width) distances, pairs)`, without gradients."""
    for columns, piece, part in references.tiles(width):
        with torch.no_grad():
            tile = distance.prepare(references.pieces[piece][part].detach().to(queries.dtype))
            s = distance.matrix(queries, tile)
        yield columns, s, pairs.tile(rows, columns)
