"""Pairs and triplets, listed."""

import torch
from torch import Tensor

from gradbank.engine.pairs import Pairs
from gradbank.engine.references import References
from gradbank.engine.statistics import EveryPair
from gradbank.engine.tiled import Bounds

LISTED_AT_MOST = 2**26  # triplets


def every_pair(pairs: Pairs, anchors: int, references: References) -> EveryPair:
    """Every pair, by anchor, then reference; one that counts several times is there as often."""
    found: list[list[Tensor]] = [[], [], [], []]
    bounds = Bounds()
    for rows in bounds.blocks(pairs, anchors, len(references)):
        for columns, _, _ in references.tiles(bounds.width(rows)):
            flat, counts, negatives = pairs.tile(rows, columns)
            width = columns.stop - columns.start
            a2, n = negatives.nonzero(as_tuple=True)
            flat = flat if counts is None else flat.repeat_interleave(counts.long())
            if negatives.dtype != torch.bool:
                times = negatives[a2, n].long()
                a2, n = a2.repeat_interleave(times), n.repeat_interleave(times)
            for out, index, start in zip(found, (flat // width, flat % width, a2, n), (rows.start, columns.start) * 2):
                out.append(index + start)
    none = torch.zeros(0, dtype=torch.int64, device=references.pieces[0].device)
    a1, p, a2, n = (torch.cat(part) if part else none for part in found)
    by_positive = (a1 * max(len(references), 1) + p).argsort()
    by_negative = (a2 * max(len(references), 1) + n).argsort()
    return EveryPair(a1[by_positive], p[by_positive], a2[by_negative], n[by_negative])


def every_positive(pairs: Pairs, anchors: int, references: References) -> tuple[Tensor, Tensor]:
    """Every positive pair: the anchors and the references, `(P,)` each."""
    device = references.pieces[0].device
    whole = pairs.listing(slice(0, anchors), torch.tensor([0, len(references)], device=device))
    if whole is not None:
        return whole.positives()
    a, p = [torch.zeros(0, dtype=torch.int64, device=device)], [torch.zeros(0, dtype=torch.int64, device=device)]
    bounds = Bounds()
    for rows in bounds.blocks(pairs, anchors, len(references)):
        for columns, _, _ in references.tiles(bounds.width(rows)):
            flat, counts, _ = pairs.tile(rows, columns)
            flat = flat if counts is None else flat.repeat_interleave(counts.long())
            width = columns.stop - columns.start
            a.append(torch.div(flat, width, rounding_mode="floor") + rows.start)
            p.append(flat % width + columns.start)
    return torch.cat(a), torch.cat(p)


def triplets_of(pairs: EveryPair) -> tuple[Tensor, Tensor, Tensor]:
    """Every `(a, p, n)` of positive and negative pairs of one anchor, by anchor, then positive, then negative.

    Raises:
        ValueError: more of them than can be listed.
    """
    size = int(max(pairs.a1.max(), pairs.a2.max())) + 1 if len(pairs.a1) and len(pairs.a2) else 0
    positive, negative = pairs.a1.argsort(stable=True), pairs.a2.argsort(stable=True)
    number = torch.bincount(pairs.a2, minlength=size)
    start = number.cumsum(0) - number
    a = pairs.a1[positive]
    each = number[a] if size else torch.zeros_like(a)
    total = int(each.sum())
    if total > LISTED_AT_MOST:
        raise ValueError(f"there are {total} triplets, too many to list ({LISTED_AT_MOST} at most)")
    first = (start[a] - (each.cumsum(0) - each)).repeat_interleave(each) if size else each
    n = pairs.n[negative[first + torch.arange(total, device=a.device)]] if total else each[:0]
    return a.repeat_interleave(each), pairs.p[positive].repeat_interleave(each), n
