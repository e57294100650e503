"""What every miner shares: the call, and pairs that are kept without being listed."""

from dataclasses import field

import torch
from torch import Tensor

from gradbank.checks import check_batch
from gradbank.component import Component, foundation
from gradbank.distances import Distance, LpDistance
from gradbank.engine import Bounds, LabelledPairs, MinedPairs, Pairs, References, full_precision


@foundation
class Miner(Component):
    """Chooses pairs by their distance, anchor by anchor.

    A subclass writes `mine`, whose answer tells tile by tile which pairs are kept; a queue uses that directly, and
    calling the miner lists the pairs.
    """

    distance: Distance = field(default_factory=LpDistance, kw_only=True)

    def mine(self, embeddings: Tensor, references: References, pairs: Pairs) -> MinedPairs:
        """Those of `pairs` that the miner keeps."""
        raise NotImplementedError(f"{type(self).__name__} must define mine")

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The kept pairs as `(a1, p, a2, n)`, int64; pass them to a loss as its `indices_tuple`.

        Args:
            embeddings: `(B, D)` floats, and labels: `(B,)`.
            ref_emb: `(M, D)` references, and ref_labels: `(M,)`; without them the batch is mined by itself.

        Raises:
            ValueError: a shape that does not fit.
        """
        check_batch(embeddings, labels)
        if ref_emb is not None:
            self.distance.check_shapes(embeddings, ref_emb)
        is_self = ref_labels is None or ref_labels is labels
        labels = labels.to(embeddings.device)
        known = labels if is_self or ref_labels is None else ref_labels.to(embeddings.device)
        with torch.no_grad(), full_precision(embeddings.device):
            references = References((embeddings if ref_emb is None else ref_emb,), known)
            own = torch.arange(len(embeddings), device=embeddings.device) if is_self else None
            mined = self.mine(embeddings, references, LabelledPairs(labels, known, own))
            return list_pairs(mined, len(embeddings), references)


def list_pairs(pairs: Pairs, anchors: int, references: References) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every pair of `pairs`, as `(a1, p, a2, n)`."""
    found: list[list[Tensor]] = [[], [], [], []]
    bounds = Bounds()
    for rows in bounds.blocks(pairs, anchors, len(references)):
        for columns, _, _ in references.tiles(bounds.width(rows)):
            flat, _, negatives = pairs.tile(rows, columns)
            width = columns.stop - columns.start
            a2, n = negatives.nonzero(as_tuple=True)
            for out, index, start in zip(found, (flat // width, flat % width, a2, n), (rows.start, columns.start) * 2):
                out.append(index + start)
    none = torch.zeros(0, dtype=torch.int64, device=references.pieces[0].device)
    a1, p, a2, n = (torch.cat(part) if part else none for part in found)
    by_pair = (a1 * max(len(references), 1) + p).argsort()
    by_negative = (a2 * max(len(references), 1) + n).argsort()
    return a1[by_pair], p[by_pair], a2[by_negative], n[by_negative]
