"""Any loss in bounded memory: blocks of anchors against tiles of references, each tile computed twice.

The first sweep over the references gathers, for a block of anchors, the distances of its positives and the
statistics of its negatives. The loss is then written on those few numbers and differentiated by autograd; the
second sweep computes each tile again and spreads the gradient over it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradbank.engine.block import Block
from gradbank.engine.declaration import Declaration
from gradbank.engine.pairs import Pairs
from gradbank.engine.references import References
from gradbank.reducers import Ratio


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
    inputs, bounds = (embeddings, *references.pieces), bounds or Bounds()
    embeddings, references = embeddings.detach(), references.detach()
    blocks = list(bounds.blocks(pairs, len(embeddings), len(references)))
    parts: dict[str, Ratio] = {}
    gradients: dict[str, list[Tensor | None]] = {}
    for rows in blocks:
        block = Block(loss, embeddings[rows], references, pairs, rows, bounds.width(rows))
        terms = block.terms()
        for name, ratio in terms.items():
            parts[name] = ratio.detached() if name not in parts else parts[name].plus(ratio.detached())
        if any(needed):
            for name, goal in _goals(terms, whole=len(blocks) == 1).items():
                if name not in gradients:
                    gradients[name] = [torch.zeros_like(x) if need else None for x, need in zip(inputs, needed)]
                block.backpropagate(goal, gradients[name])
    value = sum((ratio.value() for ratio in parts.values()), embeddings.new_zeros((), dtype=torch.float64))
    # what was differentiated by numerator still has to be divided
    shares = {name: 1.0 / parts[name].divisor() if len(blocks) > 1 else 1.0 for name in gradients}
    return value.to(embeddings.dtype), [
        _added([(made[i], shares[name]) for name, made in gradients.items()], x)
        for i, (x, need) in enumerate(zip(inputs, needed))
        if need
    ]


def _goals(terms: Mapping[str, Ratio], whole: bool) -> dict[str, Tensor]:
    """What to differentiate: the loss if the block is all there is, else the numerators, whose denominators are not
    known before the last block."""
    if not whole:
        return {name: ratio.numerator for name, ratio in terms.items()}
    with torch.enable_grad():
        return {"loss": torch.stack([ratio.value() for ratio in terms.values()]).sum()}


def _added(parts: list[tuple[Tensor | None, Tensor | float]], like: Tensor) -> Tensor:
    """The sum of the parts, each times its share."""
    scaled = [part.mul_(share) for part, share in parts if part is not None]
    return torch.zeros_like(like) if not scaled else sum(scaled[1:], scaled[0])
