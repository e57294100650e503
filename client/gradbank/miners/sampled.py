"""Miners that draw at random, from torch's global generator."""

import torch
from torch import Tensor

from gradbank.checks import check_counts
from gradbank.component import component
from gradbank.engine import Indices
from gradbank.engine.indices import unflattened
from gradbank.miners.base import Miner, check_unit_euclidean
from gradbank.miners.listing import TripletList, measured_pairs
from gradbank.miners.rows import matrix

_MOST_PAIRS = 2**24  # of a kind, drawn at once


@component
class DistanceWeightedMiner(Miner):
    """Draws negatives so that their distances are spread evenly, rather than bunched as chance would have them.

        P(n) ~ 1 / q(max(d[a, n], cutoff)),  q(d) = d^(D-2) (1 - d^2 / 4)^((D-3) / 2)

    among the negatives nearer than `nonzero_loss_cutoff`; q is the density of distances on the unit sphere. An anchor
    that has such a negative gets as many triplets as the references have rows of its label, each with a positive drawn
    evenly and a negative drawn by its weight. Weights are kept as logarithms and scaled anchor by anchor; PML scales
    them by the largest of all, and so loses anchors whose weights then underflow.

    Raises:
        ValueError: a distance other than the default, or a cutoff above 2.

    Wu et al., "Sampling Matters in Deep Embedding Learning", ICCV 2017.
    """

    cutoff: float = 0.5
    nonzero_loss_cutoff: float = 1.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unit_euclidean(self)
        if not self.cutoff <= 2:
            raise ValueError(f"cutoff must be at most 2, as distances on the unit sphere are, got {self.cutoff}")

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Indices:
        found, dimension = TripletList(embeddings.device), embeddings.shape[1]
        for rows, d, positives, negatives in matrix(self.distance, embeddings, labels, ref_emb, ref_labels):
            logs = self._log_weights(d, negatives, dimension)
            heaviest = logs.amax(1, keepdim=True)
            number = positives.sum(1)
            live = ((number > 0) & ~heaviest.squeeze(1).isneginf()).nonzero().squeeze(1)
            if not len(live):
                continue
            weights = (logs[live] - heaviest[live]).exp_()
            wanted = number[live] + int(labels is ref_labels)  # an anchor counts as a row of its label
            n = torch.multinomial(weights, int(wanted.max()), replacement=True)
            n = n[torch.arange(n.shape[1], device=n.device) < wanted[:, None]]
            row = live.repeat_interleave(wanted)
            rank = (torch.rand(len(row), dtype=torch.float64, device=d.device) * number[row]).long()
            p = positives.nonzero()[:, 1][(number.cumsum(0) - number)[row] + rank]
            found.add(row + rows.start, p, torch.ones_like(row), n.int().long)
        return found.triplets()

    def _log_weights(self, d: Tensor, negatives: Tensor, dimension: int) -> Tensor:
        """-inf where nothing is to be drawn."""
        d = d.clamp(min=max(self.cutoff, 0.0))
        logs = (2.0 - dimension) * d.log() - ((dimension - 3) / 2) * (1.0 - 0.25 * d.square()).log()
        drawn = negatives & (d < self.nonzero_loss_cutoff) & logs.isfinite()
        return logs.masked_fill_(~drawn, -torch.inf)


@component
class UniformHistogramMiner(Miner):
    """Draws as many pairs of every distance: the range of each kind's distances is cut into `num_bins` equal bins, and
    from each bin that is not empty `pos_per_bin` or `neg_per_bin` pairs are drawn evenly, with repeats.

    Raises:
        ValueError: a number below 1, or more than 16 million pairs of either kind.
    """

    num_bins: int = 100
    pos_per_bin: int = 10
    neg_per_bin: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "num_bins", most=_MOST_PAIRS)
        check_counts(self, "pos_per_bin", "neg_per_bin", most=_MOST_PAIRS // self.num_bins)

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Indices:
        pairs = measured_pairs(self.distance, embeddings, labels, ref_emb, ref_labels)
        drawn = [flat[self._drawn(d, number)] for (flat, d), number in zip(pairs, (self.pos_per_bin, self.neg_per_bin))]
        return *unflattened(drawn[0], len(ref_emb)), *unflattened(drawn[1], len(ref_emb))

    def _drawn(self, d: Tensor, number: int) -> Tensor:
        """Which of the `(P,)` distances are drawn, `number` of each bin."""
        if not len(d):
            return torch.zeros(0, dtype=torch.int64, device=d.device)
        lowest, highest = d.aminmax()
        edges = torch.linspace(lowest, highest, self.num_bins + 1, device=d.device, dtype=d.dtype)
        bins = torch.bucketize(d, edges[1:-1], right=True, out_int32=True)
        size = torch.bincount(bins, minlength=self.num_bins)
        start = (size.cumsum(0) - size)[size > 0]
        rank = torch.rand(len(start), number, dtype=torch.float64, device=d.device) * size[size > 0][:, None]
        return bins.argsort()[(start[:, None] + rank.long()).view(-1)]
