"""Every pair and every triplet that labels make: what a miner of one's own chooses from."""

import torch
from torch import Tensor

from gradbank.engine import LabelledPairs, References, every_pair, triplets_of
from gradbank.engine.statistics import EveryPair


def get_all_pairs_indices(labels: Tensor, ref_labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every positive pair `(a1, p)` and every negative pair `(a2, n)`, int64, by anchor and then by reference.

    Args:
        labels: `(B,)` of the anchors, and ref_labels: `(M,)` of the references. Without those, or if they are the very
            object `labels`, reference i is anchor i, and no anchor is its own positive.
    """
    listed = _every_pair(labels, ref_labels)
    return listed.a1, listed.p, listed.a2, listed.n


def get_all_triplets_indices(labels: Tensor, ref_labels: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Every triplet `(a, p, n)`, int64, by anchor, then by positive, then by negative: the arguments are those of
    `get_all_pairs_indices`."""
    return triplets_of(_every_pair(labels, ref_labels), at_most=None)


def _every_pair(labels: Tensor, ref_labels: Tensor | None) -> EveryPair:
    own = ref_labels is None or ref_labels is labels
    known = labels if own or ref_labels is None else ref_labels.to(labels.device)
    pairs = LabelledPairs(labels, known, torch.arange(len(labels), device=labels.device) if own else None)
    return every_pair(pairs, len(labels), References((known[:, None],)))
