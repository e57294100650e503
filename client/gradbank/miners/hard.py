"""Miners that take one positive and one negative of each anchor, by how hard they are."""

from collections.abc import Sequence
from dataclasses import field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbank.component import component
from gradbank.engine import Indices
from gradbank.miners.base import Miner
from gradbank.miners.listing import PairList
from gradbank.miners.rows import matrix

Strategy = Literal["hard", "semihard", "easy", "all"]


@component
class BatchEasyHardMiner(Miner):
    """Takes one positive and one negative of each anchor that has both, or all of a kind.

    By kind, `hard` is the farthest positive or the closest negative, `easy` the reverse, and `semihard` the hardest of
    those that leave the anchor closer to its positive than to its negative, whichever of the two was chosen first by
    the other strategy. Of equally far ones the first counts.

    Args:
        pos_strategy, neg_strategy: of the positives and of the negatives; `all` of either does not go with
            `semihard`, nor does `semihard` with itself.
        allowed_pos_range, allowed_neg_range: the lowest and the highest distance a chosen pair may have; `all` ignores
            them, as in PML.

    Attributes:
        easiest_pos_pair, hardest_pos_pair, easiest_neg_pair, hardest_neg_pair: with `collect_stats`, the extreme
            distances of the chosen pairs.
        easiest_triplet, hardest_triplet: those of positive less negative distance, where neither kind is `all`.

    Raises:
        ValueError: strategies that do not go together, or a range that is not two numbers.

    Xuan et al., "Improved Embeddings with Easy Positive Triplet Mining", WACV 2020.
    """

    HARD: ClassVar[Literal["hard"]] = "hard"
    SEMIHARD: ClassVar[Literal["semihard"]] = "semihard"
    EASY: ClassVar[Literal["easy"]] = "easy"
    ALL: ClassVar[Literal["all"]] = "all"

    pos_strategy: Strategy = "easy"
    neg_strategy: Strategy = "semihard"
    allowed_pos_range: Sequence[float] | None = None
    allowed_neg_range: Sequence[float] | None = None
    easiest_triplet: float | None = field(default=None, init=False)
    hardest_triplet: float | None = field(default=None, init=False)
    easiest_pos_pair: float | None = field(default=None, init=False)
    hardest_pos_pair: float | None = field(default=None, init=False)
    easiest_neg_pair: float | None = field(default=None, init=False)
    hardest_neg_pair: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (self.HARD, self.SEMIHARD, self.EASY, self.ALL)
        for name in ("pos_strategy", "neg_strategy"):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        both = {self.pos_strategy, self.neg_strategy}
        if self.SEMIHARD in both and both <= {self.SEMIHARD, self.ALL}:
            raise ValueError(
                "semihard needs a pair of the other kind to start from: the other strategy must be hard or easy, got "
                f"pos_strategy={self.pos_strategy!r}, neg_strategy={self.neg_strategy!r}"
            )
        for name in ("allowed_pos_range", "allowed_neg_range"):
            if getattr(self, name) is not None and len(getattr(self, name)) != 2:
                raise ValueError(f"{name} must be (lowest, highest), got {getattr(self, name)!r}")

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Indices:
        device, number = embeddings.device, len(ref_emb)
        positives, negatives = PairList(number, device), PairList(number, device)
        far: tuple[list[Tensor], list[Tensor]] = [], []  # of the chosen pairs
        for rows, d, is_positive, is_negative in matrix(self.distance, embeddings, labels, ref_emb, ref_labels):
            u = -d if self.distance.is_inverted else d  # larger is farther
            p, n = self._chosen(u, d, is_positive, is_negative)
            positives.add(p, rows.start)
            negatives.add(n, rows.start)
            if self.collect_stats:
                for values, flat in zip(far, (p, n)):
                    values.append(u.reshape(-1)[flat])
        if self.collect_stats:
            self._set_stats(*(torch.cat(values) if values else torch.zeros(0) for values in far))
        return *positives.pairs(), *negatives.pairs()

    def _chosen(self, u: Tensor, d: Tensor, positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """The positions of the chosen positives and negatives of a block."""
        near = _within(d, positives, self.allowed_pos_range)
        away = _within(d, negatives, self.allowed_neg_range)
        if self.pos_strategy == self.SEMIHARD:
            n, least, has_n = _extreme(u, away, farthest=self.neg_strategy == self.EASY)
            p, _, has_p = _extreme(u, near & (u < least), farthest=True)
        else:
            p, most, has_p = _extreme(u, near, farthest=self.pos_strategy == self.HARD)
            away = away & (u > most) if self.neg_strategy == self.SEMIHARD else away
            n, _, has_n = _extreme(u, away, farthest=self.neg_strategy == self.EASY)
        every = [strategy == self.ALL for strategy in (self.pos_strategy, self.neg_strategy)]
        if not any(every):
            has_p = has_n = has_p & has_n
        p = positives.view(-1).nonzero().squeeze(1) if every[0] else p[has_p]
        return p, negatives.view(-1).nonzero().squeeze(1) if every[1] else n[has_n]

    def _set_stats(self, positives: Tensor, negatives: Tensor) -> None:
        sign = -1 if self.distance.is_inverted else 1
        if len(positives):
            self.easiest_pos_pair = sign * float(positives.min())
            self.hardest_pos_pair = sign * float(positives.max())
        if len(negatives):
            self.easiest_neg_pair = sign * float(negatives.max())
            self.hardest_neg_pair = sign * float(negatives.min())
        if len(positives) and self.ALL not in (self.pos_strategy, self.neg_strategy):
            self.easiest_triplet = sign * float((positives - negatives).min())
            self.hardest_triplet = sign * float((positives - negatives).max())


def _within(d: Tensor, mask: Tensor, limits: Sequence[float] | None) -> Tensor:
    return mask if limits is None else mask & (d >= limits[0]) & (d <= limits[1])


def _extreme(u: Tensor, allowed: Tensor, farthest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's farthest or closest entry that is allowed: its position, `(b,)`, its distance, `(b, 1)`, and whether
    there is one, `(b,)`."""
    hidden = u.masked_fill(~allowed, -torch.inf if farthest else torch.inf)
    value, column = hidden.max(1, keepdim=True) if farthest else hidden.min(1, keepdim=True)
    start = torch.arange(len(u), device=u.device) * u.shape[1]
    return start + column.squeeze(1), value, allowed.any(1)


@component
class BatchHardMiner(BatchEasyHardMiner):
    """Takes the farthest positive and the closest negative of each anchor that has both, as triplets `(a, p, n)`.

    Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", ARXIV 2017.
    """

    pos_strategy: Strategy = field(default="hard", init=False)
    neg_strategy: Strategy = field(default="hard", init=False)
    allowed_pos_range: Sequence[float] | None = field(default=None, kw_only=True)
    allowed_neg_range: Sequence[float] | None = field(default=None, kw_only=True)

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Indices:
        a, p, _, n = super().mine(embeddings, labels, ref_emb, ref_labels)
        return a, p, n
