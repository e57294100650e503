"""The miner of the hardest share of all pairs."""

import math
from collections.abc import Sequence

from torch import Tensor

from gradbank.component import component
from gradbank.engine import Indices, References, as_pairs, check_indices, listed_distances, widened
from gradbank.engine.indices import unflattened
from gradbank.miners.base import Miner
from gradbank.miners.listing import measured_pairs
from gradbank.miners.rows import kinds


@component
class HDCMiner(Miner):
    """Takes the hardest share of all pairs, hardest first: the farthest positives and the closest negatives.

    The share is of the batch's pairs together, not anchor by anchor, and rounded up.

    Args:
        filter_percentage: the share, 0 to 1.

    Attributes:
        a1, p, a2, n: the pairs last taken, or set from outside.
        was_set_externally: whether the next call takes its share of these, rather than of all pairs.

    Raises:
        ValueError: a share that is not one.

    Yuan et al., "Hard-Aware Deeply Cascaded Embedding", ICCV 2017.
    """

    filter_percentage: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.filter_percentage <= 1:
            raise ValueError(f"filter_percentage must be a share between 0 and 1, got {self.filter_percentage}")
        self.reset_idx()

    def reset_idx(self) -> None:
        """Makes calls take their share of all pairs again."""
        self.a1: Tensor | None = None
        self.p: Tensor | None = None
        self.a2: Tensor | None = None
        self.n: Tensor | None = None
        self.was_set_externally = False

    def set_idx_externally(self, external_indices_tuple: Indices | None, labels: Tensor) -> None:
        """Makes calls take their share of these pairs (or triplets) and then of what they took, until `reset_idx`.

        Args:
            external_indices_tuple: `(a1, p, a2, n)` or `(a, p, n)`; None is all pairs of the `(B,)` labels.
        """
        if external_indices_tuple is None:
            masks = kinds(labels, labels, slice(0, len(labels)))
            external_indices_tuple = tuple(index for mask in masks for index in mask.nonzero(as_tuple=True))
        self.a1, self.p, self.a2, self.n = as_pairs(external_indices_tuple, external_indices_tuple[0].device)
        self.was_set_externally = True

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Indices:
        taken: list[Tensor] = []
        if self.was_set_externally:
            candidates = self._external(widened(embeddings.detach()), widened(ref_emb.detach()))
        else:
            candidates = measured_pairs(self.distance, embeddings, labels, ref_emb, ref_labels)
        for (flat, d), positive in zip(candidates, (True, False)):
            share = math.ceil(self.filter_percentage * len(d))
            hardest = d.topk(share, largest=positive != self.distance.is_inverted).indices
            taken += unflattened(flat[hardest], len(ref_emb))
        self.a1, self.p, self.a2, self.n = taken
        return self.a1, self.p, self.a2, self.n

    def _external(self, embeddings: Tensor, ref_emb: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """The pairs set from outside, by kind, as positions and distances."""
        found = []
        for kind, anchors, others in (("positive", self.a1, self.p), ("negative", self.a2, self.n)):
            assert anchors is not None
            assert others is not None
            anchors, others = anchors.to(embeddings.device), others.to(embeddings.device)
            check_indices("anchor", anchors, len(embeddings))
            check_indices(kind, others, len(ref_emb))
            d = listed_distances(self.distance, embeddings, References((ref_emb,)), anchors, others)
            found.append((anchors * len(ref_emb) + others, d))
        return found
