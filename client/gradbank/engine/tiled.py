"""Any loss in bounded memory: blocks of anchors against tiles of references.

A first sweep over the references finds, for each block of anchors, the distances of its positives and the statistics
of its negatives. The loss is then written on those few numbers and differentiated by autograd, and its gradient is
handed back through the statistics.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradbank.engine.anchors import Anchors, Gathered, Positives
from gradbank.engine.backward import backpropagate
from gradbank.engine.block import Block
from gradbank.engine.declaration import Declaration, parts_of
from gradbank.engine.gradients import Gradients
from gradbank.engine.pairs import Pairs
from gradbank.engine.references import References
from gradbank.engine.room import room
from gradbank.reducers import Ratio

# glibc returns a freed block to the system unless it has seen one as large freed before, and what tiles are made of
# would be faulted in anew for each tile, as slow as the arithmetic itself. So it is shown one, which nobody touches.
torch.empty(2**24, dtype=torch.uint8)


@dataclass(frozen=True)
class Bounds:
    """What a step may hold at a time.

    Attributes:
        tile: entries of the distance matrix in a tile; the default is 2 MiB of float32, about a core's cache.
        rows: anchors in a block, at most, where there are references enough to fill a tile.
        positives: positive pairs held, at most; each takes some 50 bytes. Where there are more, blocks of anchors are
            written one at a time, each (but for a single anchor) with no more than these.
        kept: entries of the distance matrix, at most, that are kept from a first sweep for a second one; statistics
            may keep as many numbers of their own.
        ready: numbers of the references that are normalised once for all blocks, at most.

    The defaults are for a CPU.
    """

    tile: int = 2**19
    rows: int = 512
    positives: int = 3 * 2**19
    kept: int = 2**23
    ready: int = 2**21

    @classmethod
    def on(cls, device: torch.device) -> "Bounds":
        """The bounds that suit a device."""
        return cls(tile=room(cls.tile, device), rows=room(cls.rows, device))

    def blocks(self, pairs: Pairs, anchors: int, references: int) -> Iterator[slice]:
        """Blocks of anchors; those of a block have room for as many positives as the richest has."""
        few = anchors * references <= self.positives
        richest = 1 if few else int(pairs.most_positives().max())
        most = max(self.rows, self.tile // max(references, 1), 1)
        step = max(1, min(most, self.positives // max(richest, 1)))
        for start in range(0, max(anchors, 1), step):
            yield slice(start, min(start + step, anchors))

    def width(self, rows: slice, vectors: int = 1) -> int:
        """How many references of so many vectors each a tile of some anchors has."""
        height: int = rows.stop - rows.start
        return max(1, self.tile // max(height * vectors, 1))


def tiled(
    loss: Declaration,
    embeddings: Tensor,
    references: References,
    pairs: Pairs,
    learned: list[Tensor],
    needed: tuple[bool, ...],
    bounds: Bounds | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of `(B, D)` embeddings and its gradients, in memory that does not grow with `B * M`.

    Args:
        learned: the parameters of the loss.
        needed: whether a gradient is wanted of the embeddings, of each piece of the references, and of each parameter.
    """
    bounds = bounds or Bounds.on(embeddings.device)
    embeddings, references = embeddings.detach(), references.detach()
    keeps = len(embeddings) * len(references) <= bounds.positives
    keeps = keeps or not pairs.names_positives or int(pairs.most_positives().sum()) <= bounds.positives
    gathers = any(needed) and not any(needed[1 : 1 + len(references.pieces)])
    keeps_tiles = keeps and any(needed) and len(embeddings) * len(references) <= bounds.kept
    into = Gradients(embeddings, references.pieces, learned, needed)
    blocks, places = [], list(bounds.blocks(pairs, len(embeddings), len(references)))
    alike = all(piece.dtype == embeddings.dtype for piece in references.pieces)
    if len(places) > 1 and alike and sum(piece.numel() for piece in references.pieces) <= bounds.ready:
        references, *through = references.made_ready(loss.distance, needed[1:])
        into.goes_through(*through)
    for rows in places:
        width = bounds.width(rows, references.vectors)
        blocks.append(Block(loss, embeddings[rows], references, pairs, rows, width, gathers, keeps, keeps_tiles))
    written = _Written(loss, embeddings, [blocks] if keeps else [[block] for block in blocks])
    value = written.value().to(embeddings.dtype)
    if any(needed):
        for block, of_positives, of_leaves in written.gradients(into):
            backpropagate(block, of_positives, of_leaves, into)
    return value, into.wanted()


_JOINED = (
    "this loss is written on the positives of all anchors together, and there are too many of them to hold: give it "
    "fewer rows, or labels with fewer positives each"
)


class _Written:
    """The loss written on what groups of blocks found: one group where all of it was kept, else each block by itself,
    once for the value and again for the gradient."""

    def __init__(self, loss: Declaration, embeddings: Tensor, groups: list[list[Block]]) -> None:
        if len(groups) > 1 and loss.joins_anchors:
            raise ValueError(_JOINED)
        self.loss, self.whole, self.groups = loss, embeddings, groups
        self.parts: dict[str, Ratio] = {}

    def value(self) -> Tensor:
        """The loss, `()` float64."""
        for group in self.groups:
            with torch.set_grad_enabled(len(self.groups) == 1):
                terms = self._write(group)
            for name, ratio in terms.items():
                self.parts[name] = ratio if name not in self.parts else self.parts[name].plus(ratio)
        with torch.set_grad_enabled(len(self.groups) == 1):
            self.goal = Ratio.total(self.parts.values())
        return self.goal.detach()

    def gradients(self, into: Gradients) -> Iterator[tuple[Block, Tensor | None, dict[str, Tensor]]]:
        """For each block, the gradient of its positives and of its leaves; that of all else is added to `into`."""
        for group in self.groups:
            goal = self.goal
            if len(self.groups) > 1:
                with torch.enable_grad():
                    own = self._write(group)
                    shares = [Ratio(each.numerator, self.parts[name].denominator) for name, each in own.items()]
                    goal = Ratio.total(shares)
            if goal.requires_grad:
                yield from self._of(group, goal, into)

    def _write(self, group: list[Block]) -> dict[str, Ratio]:
        """The parts of the loss of some blocks, whose positives and leaves become differentiable."""
        self.positives = [block.positives_again() for block in group]
        self.positives = [p._replace(s=p.s.detach().requires_grad_()) for p in self.positives]
        self.leaves = [{n: leaf.detach().requires_grad_() for n, leaf in block.leaves.items()} for block in group]
        self.embeddings = self.whole[_place(group)].detach().requires_grad_()
        anchors = _joined([b.anchors(leaf, p) for b, leaf, p in zip(group, self.leaves, self.positives)])
        anchors = replace(anchors, embeddings=self.embeddings)
        reducer = self.loss.reducer
        parts = parts_of(self.loss, anchors)
        whole = any(each.kind == "already_reduced" and each.counts is None for each in parts.values())
        if whole and len(self.groups) > 1:  # it is a number already, and that of some anchors only
            raise ValueError(_JOINED)
        return {name: anchors.reduce(part, reducer.of(name)) for name, part in parts.items()}

    def _of(
        self, group: list[Block], goal: Tensor, into: Gradients
    ) -> Iterator[tuple[Block, Tensor | None, dict[str, Tensor]]]:
        asked = [positives.s for positives in self.positives]
        asked += [leaf for leaves in self.leaves for leaf in leaves.values()]
        asked += [self.embeddings, *into.parameters]
        # kept, for what the statistics take of the parameters is differentiated again
        made = iter(torch.autograd.grad(goal, asked, allow_unused=True, retain_graph=True))
        of_positives = [next(made) for _ in group]
        of_leaves = [{name: next(made) for name in leaves} for leaves in self.leaves]
        own = next(made)
        if own is not None:
            into.add(0, _place(group), own)
        into.add_to_parameters(list(made))
        for block, own_positives, leaves in zip(group, of_positives, of_leaves):
            yield block, own_positives, {name: gradient for name, gradient in leaves.items() if gradient is not None}


def _place(blocks: list[Block]) -> slice:
    """Which of the batch's anchors are those of some blocks."""
    return slice(blocks[0].rows.start, blocks[-1].rows.stop)


def _joined(blocks: list[Anchors]) -> Anchors:
    """The anchors of several blocks as one, but for their embeddings."""
    if len(blocks) == 1:
        return blocks[0]
    offsets = [sum(block.size for block in blocks[:i]) for i in range(len(blocks))]
    first = blocks[0]
    positives = Positives(
        torch.cat([block.positives.s for block in blocks]),
        torch.cat([block.positives.anchor + offset for block, offset in zip(blocks, offsets)]),
        torch.cat([block.positives.times for block in blocks]),
        torch.cat([block.positives.other for block in blocks]),
    )
    found = {
        name: Gathered(
            torch.cat([block.found[name].value for block in blocks]),
            _cat([block.found[name].number for block in blocks]),
            extra=_cat([block.found[name].extra for block in blocks]),
        )
        for name in first.found
    }
    return Anchors(
        sum(block.size for block in blocks),
        _cat([block.labels for block in blocks]),
        first.embeddings,
        positives,
        first.among_themselves,
        _cat([block.weight for block in blocks]),
        slice(first.place.start, blocks[-1].place.stop),
        first.interval,
        found,
    )


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    """The parts end to end; None where there are none."""
    some = [part for part in parts if part is not None]
    return torch.cat(some) if len(some) == len(parts) else None
