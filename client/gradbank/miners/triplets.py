"""Miners of triplets."""

import math
from collections.abc import Mapping
from dataclasses import field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from gradbank.component import component
from gradbank.engine import (
    Anchors,
    Hinge,
    Indices,
    LabelledPairs,
    Pairs,
    Part,
    References,
    Statistic,
    first_not_above,
    full_precision,
    look,
    widened,
)
from gradbank.miners.base import Miner
from gradbank.miners.listing import TripletList
from gradbank.miners.rows import ENTRIES, matrix
from gradbank.miners.totals import totals
from gradbank.reducers import Tally


@component
class TripletMarginMiner(Miner):
    """Takes the triplets by how much farther the negative is than the positive.

        margin[a, p, n] = d[a, n] - d[a, p]

        all       margin[a, p, n] <= margin
        hard      margin[a, p, n] <= margin  and  margin[a, p, n] <= 0
        semihard  margin[a, p, n] <= margin  and  margin[a, p, n] > 0
        easy      margin[a, p, n] > margin

    With a similarity in place of a distance the difference changes sign. The triplets of a positive pair are those
    whose negative lies in one `interval` of distances, found by bisection among the anchor's sorted negatives.

    Attributes:
        avg_triplet_margin, pos_pair_dist, neg_pair_dist: with `collect_stats`, the means of the margin and of both
            distances over all triplets that could be made; 0 if none.

    Raises:
        ValueError: another type of triplets.

    Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and Clustering", CVPR 2015.
    """

    margin: float = 0.2
    type_of_triplets: Literal["all", "hard", "semihard", "easy"] = "all"
    avg_triplet_margin: float | None = field(default=None, init=False)
    pos_pair_dist: float | None = field(default=None, init=False)
    neg_pair_dist: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.type_of_triplets not in ("all", "hard", "semihard", "easy"):
            raise ValueError(f"type_of_triplets must be all, hard, semihard or easy, got {self.type_of_triplets!r}")

    def interval(self, u: Tensor) -> Tensor:
        """Which distances of a negative make a triplet with each positive: `(P,)` gives `(P, 2)`, `low <= v < high`.

        Distances are such that larger is farther (a similarity is negated). The thresholds are floats of the same
        dtype, and exact: a negative lies between them just when the rounded difference meets the condition.
        """
        everything = torch.full_like(u, torch.inf)
        above_zero, above_margin = self._first_above(u, 0.0), self._first_above(u, self.margin)
        low, high = {
            "all": (-everything, above_margin),
            "hard": (-everything, torch.minimum(above_zero, above_margin)),
            "semihard": (above_zero, torch.maximum(above_zero, above_margin)),
            "easy": (above_margin, everything),
        }[self.type_of_triplets]
        return torch.stack([low, high], 1)

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Indices:
        found = TripletList(embeddings.device)
        for rows, d, positives, negatives in matrix(self.distance, embeddings, labels, ref_emb, ref_labels):
            u = -d if self.distance.is_inverted else d
            row, p = positives.nonzero(as_tuple=True)
            if math.isfinite(u.sum()):
                ordered, column = u.masked_fill(~negatives, torch.inf).sort(1)
                start, stop = _below(ordered, row, self.interval(u[row, p])).unbind(1)
                counts = stop - start
                negatives_of = partial(_runs, column.int(), row, start, counts)
            else:  # NaN has no place in an order, and what is infinite none of its own
                counts, listed = self._compared(u, row, p, negatives)
                negatives_of = partial(torch.cat, listed)
            found.add(row + rows.start, p, counts, negatives_of)
        if self.collect_stats:
            own = torch.arange(len(embeddings), device=embeddings.device) if ref_labels is labels else None
            self._average(embeddings, References((ref_emb,), ref_labels), LabelledPairs(labels, ref_labels, own))
        return found.triplets()

    def _compared(self, u: Tensor, row: Tensor, p: Tensor, negatives: Tensor) -> tuple[Tensor, list[Tensor]]:
        """How many negatives each positive has, and which they are, by a look at all of them."""
        step = max(1, ENTRIES // max(u.shape[1], 1))
        counts, listed = [row.new_zeros(0)], [row.new_zeros(0)]
        for first in range(0, len(row), step):
            anchor = row[first : first + step]
            taken = self._takes(u[anchor] - u[anchor, p[first : first + step], None]) & negatives[anchor]
            counts.append(taken.sum(1))
            listed.append(taken.nonzero()[:, 1])
        return torch.cat(counts), listed

    def _takes(self, margin: Tensor) -> Tensor:
        within = margin <= self.margin
        return {
            "all": within,
            "hard": within & (margin <= 0),
            "semihard": within & (margin > 0),
            "easy": margin > self.margin,
        }[self.type_of_triplets]

    def watch(self, embeddings: Tensor, references: References, taken: Pairs) -> None:
        self.reset_stats()
        self._average(embeddings, references, taken)
        number = _Number(self)
        with full_precision(embeddings.device):
            look(number, embeddings, references, taken)
        self.num_triplets = int(number.reducer.value())

    def _average(self, embeddings: Tensor, references: References, pairs: Pairs) -> None:
        """Writes the means over all triplets that could be made of the pairs."""
        with full_precision(embeddings.device):
            queries = self.distance.prepare(widened(embeddings.detach()))
        every = totals(self.distance, queries, references.detach(), pairs)
        number = (every.positives @ every.negatives).clamp(min=1)
        self.pos_pair_dist = float(every.near @ every.negatives / number)
        self.neg_pair_dist = float(every.far @ every.positives / number)
        self.avg_triplet_margin = float(self.distance.margin(self.neg_pair_dist, self.pos_pair_dist))

    def _first_above(self, u: Tensor, margin: float) -> Tensor:
        """The smallest `v` for which the rounded `v - u` exceeds the margin."""
        if margin == 0:
            return torch.nextafter(u, torch.full_like(u, torch.inf))
        if math.isinf(margin):  # nothing does, or everything
            return torch.full_like(u, margin)
        slack = 8 * torch.finfo(u.dtype).eps * (u.abs() + abs(margin))
        return first_not_above(lambda v: u - v, u + margin, slack, -margin, strict=False)


class _Number:
    """A loss that counts the triplets that a miner takes."""

    joins_anchors = False

    def __init__(self, miner: TripletMarginMiner) -> None:
        self.distance, self.reducer = miner.distance, Tally(miner, ["num_triplets"])

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"number": Hinge(-self.distance.sign, 0.0, anchors.interval)}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        return {"number": anchors.per_triplet("number")}


@component
class EmbeddingsAlreadyPackagedAsTriplets(Miner):
    """Takes rows 0, 1 and 2 as anchor, positive and negative, rows 3, 4 and 5 as the next, and so on.

    Raises:
        ValueError: when it is called, a number of rows that is no multiple of three.
    """

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Indices:
        if len(embeddings) % 3:
            raise ValueError(f"triplets are three rows each, got {len(embeddings)} rows of embeddings")
        a, p, n = torch.arange(len(embeddings), device=embeddings.device).view(-1, 3).unbind(1)
        return a, p, n


def _runs(columns: Tensor, row: Tensor, start: Tensor, counts: Tensor) -> Tensor:
    """Of some rows of the `(b, M)` columns, as many as each counts from its start, one after the other."""
    total = int(counts.sum())
    first = row * columns.shape[1] + start - (counts.cumsum(0) - counts)
    place = torch.arange(total, device=row.device)
    place += first.repeat_interleave(counts, output_size=total)
    return columns.view(-1)[place]


def _below(ordered: Tensor, row: Tensor, thresholds: Tensor) -> Tensor:
    """How many of its row's ascending values, `(b, M)`, are below each of the `(P, 2)` thresholds.

    Args:
        row: `(P,)` the row of each, ascending.
    """
    number = torch.bincount(row, minlength=len(ordered))
    slot = torch.arange(len(row), device=row.device) - (number.cumsum(0) - number)[row]
    table = ordered.new_zeros(len(ordered), int(number.max()), 2)
    table[row, slot] = thresholds
    return torch.searchsorted(ordered, table.flatten(1)).view(table.shape)[row, slot]
