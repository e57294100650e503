"""Pairs and triplets, listed."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gradbank.engine.indices import unflattened
from gradbank.engine.pairs import Pairs, TilePairs
from gradbank.engine.references import References
from gradbank.engine.statistics import EveryPair
from gradbank.engine.tiled import Bounds

LISTED_AT_MOST = 2**26  # triplets


def every_pair(pairs: Pairs, anchors: int, references: References) -> EveryPair:
    """Every pair, by anchor, then reference; one that counts several times is there as often."""
    positives, negatives, number = [], [], len(references)
    for rows, tile in _whole_rows(pairs, anchors, references):
        start = rows.start * number
        positives.append(start + _repeated(*tile[:2]))
        flat = tile.negatives.reshape(-1)
        place = flat.nonzero().squeeze(1)
        times = None if flat.dtype == torch.bool else flat[place]
        negatives.append(start + _repeated(place, times))
    return EveryPair(*unflattened(torch.cat(positives), number), *unflattened(torch.cat(negatives), number))


def every_positive(pairs: Pairs, anchors: int, references: References) -> tuple[Tensor, Tensor]:
    """Every positive pair: the anchors and the references, `(P,)` each."""
    device, number = references.pieces[0].device, len(references)
    whole = pairs.listing(slice(0, anchors), torch.tensor([0, number], device=device))
    if whole is not None:
        return whole.positives()
    tiles = _whole_rows(pairs, anchors, references)
    return unflattened(torch.cat([rows.start * number + _repeated(*tile[:2]) for rows, tile in tiles]), number)


def _whole_rows(pairs: Pairs, anchors: int, references: References) -> Iterator[tuple[slice, TilePairs]]:
    """A few anchors at a time against all references."""
    step = max(1, Bounds.on(references.pieces[0].device).tile // max(len(references), 1))
    for start in range(0, max(anchors, 1), step):
        rows = slice(start, min(start + step, anchors))
        yield rows, pairs.tile(rows, slice(0, len(references)))


def _repeated(flat: Tensor, times: Tensor | None) -> Tensor:
    """Positions in order, each as often as it counts."""
    return flat if times is None else flat.repeat_interleave(times.long()).sort().values


def triplets_of(pairs: EveryPair, at_most: int | None = LISTED_AT_MOST) -> tuple[Tensor, Tensor, Tensor]:
    """Every `(a, p, n)` of positive and negative pairs of one anchor, by anchor, then positive, then negative.

    Raises:
        ValueError: more than `at_most` of them, if there is a limit.
    """
    size = int(max(pairs.a1.max(), pairs.a2.max())) + 1 if len(pairs.a1) and len(pairs.a2) else 0
    positive, negative = pairs.a1.argsort(stable=True), pairs.a2.argsort(stable=True)
    number = torch.bincount(pairs.a2, minlength=size)
    start = number.cumsum(0) - number
    a = pairs.a1[positive]
    each = number[a] if size else torch.zeros_like(a)
    total = int(each.sum())
    if at_most is not None and total > at_most:
        raise ValueError(f"there are {total} triplets, too many to list ({at_most} at most)")
    first = (start[a] - (each.cumsum(0) - each)).repeat_interleave(each) if size else each
    n = pairs.n[negative[first + torch.arange(total, device=a.device)]] if total else each[:0]
    return a.repeat_interleave(each), pairs.p[positive].repeat_interleave(each), n
