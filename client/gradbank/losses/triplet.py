"""Losses over triplets: an anchor, a positive and a negative."""

from collections.abc import Mapping
from dataclasses import field
from typing import Literal

import torch
from torch import Tensor, relu

from gradbank.component import component
from gradbank.engine import (
    Anchors,
    Below,
    Indices,
    References,
    Statistic,
    as_triplets,
    first_not_above,
    full_precision,
    listed_distances,
)
from gradbank.losses.base import PairLoss
from gradbank.reducers import AvgNonZeroReducer, Ratio, Reducer


@component
class TripletMarginLoss(PairLoss):
    """Asks that an anchor's positive be closer than its negative, by a margin.

        loss[a, p, n] = relu(d[a, p] - d[a, n] + margin)

    over all triplets, exactly, without making them: see `gradbank.engine.below`. With a similarity in place of
    a distance the difference changes sign.

    Args:
        margin: by how much.
        swap, smooth_loss, triplets_per_anchor: as in PML; only the defaults are computed so far.

    Raises:
        ValueError: an argument that asks for a variant which is not computed yet.

    Schroff et al., "FaceNet: A Unified Embedding for Face Recognition and Clustering", CVPR 2015.
    """

    margin: float = 0.05
    swap: bool = False
    smooth_loss: bool = False
    triplets_per_anchor: int | Literal["all"] = "all"
    reducer: Reducer = field(default_factory=AvgNonZeroReducer, kw_only=True)

    def __post_init__(self) -> None:
        for name, only in (("swap", False), ("smooth_loss", False), ("triplets_per_anchor", "all")):
            if getattr(self, name) != only:
                raise ValueError(f"TripletMarginLoss computes {name}={only!r} only, got {getattr(self, name)!r}")

    def negatives(self) -> Mapping[str, Statistic]:
        return {"nearer": Below(self._distance, self._thresholds)}

    def _distance(self, s: Tensor) -> Tensor:
        return -self.distance.closeness(s)

    def _violation(self, positive: Tensor, negative: Tensor) -> Tensor:
        return positive - negative + self.margin

    def _thresholds(self, s: Tensor) -> Tensor:
        """`(P, K)`: below which distance a negative violates, counts, and is past the reducer's `high`."""
        u = self._distance(s)
        low, high = self.reducer.bounds
        bound = max(low, 0.0) if low is not None else 0.0

        def first(bound: float, strict: bool) -> Tensor:
            # a few roundings of the terms, each of which is at most this large
            slack = 8 * torch.finfo(u.dtype).eps * (u.abs() + abs(self.margin) + abs(bound))
            return first_not_above(lambda t: self._violation(u, t), u + self.margin - bound, slack, bound, strict)

        every = torch.full_like(u, torch.inf)
        if high is not None and high <= bound:  # nothing lies between the bounds
            return torch.stack([every] * 3, 1)
        adding = first(bound, strict=True)
        asked = [adding, every if low is None or low < 0 else adding]
        if high is not None:
            asked.append(first(high, strict=False))
        return torch.stack(asked, 1)

    def terms(self, anchors: Anchors) -> Mapping[str, Ratio]:
        s, _, times = anchors.positives
        sums, counts = anchors.found["nearer"]
        assert counts is not None
        adding, counted, total = counts[:, 0], counts[:, 1], sums[:, 0]
        if counts.shape[1] == 3:
            adding, counted, total = adding - counts[:, 2], counted - counts[:, 2], total - sums[:, 2]
        losses = adding * (self._distance(s).double() + self.margin) - total
        return {"loss": Ratio((losses * times).sum(), (counted * times).sum())}

    def compare_listed(self, embeddings: Tensor, references: References, indices: Indices) -> Tensor:
        """Triplets `(a, p, n)` as they are listed; pairs `(a1, p, a2, n)` are joined on equal anchors."""
        if len(indices) == 4:
            return super().compare_listed(embeddings, references, indices)
        with full_precision(embeddings.device):
            return self._of_triplets(embeddings, references, indices)

    def _of_triplets(self, embeddings: Tensor, references: References, indices: Indices) -> Tensor:
        a, p, n = as_triplets(indices, (len(embeddings), len(references)), embeddings.device)
        near = listed_distances(self.distance, embeddings, references, a, p)
        far = listed_distances(self.distance, embeddings, references, a, n)
        losses = relu(self._violation(self._distance(near), self._distance(far)))
        ratio: Ratio = self.reducer(losses)
        return self.regularized(ratio.value().to(embeddings.dtype), embeddings)
