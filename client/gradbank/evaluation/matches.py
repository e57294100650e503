"""Which embeddings match, by a threshold on their distance."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradbank.distances import Distance
from gradbank.evaluation.neighbors import BUDGET
from gradbank.parts import check_is

Mask = np.ndarray[Any, np.dtype[np.bool_]]


class MatchFinder:
    """Finds pairs at most `threshold` apart, or at least `threshold` similar.

        match[q, r] = d[q, r] <= threshold, or s[q, r] >= threshold

    Args:
        distance: how embeddings are compared.
        threshold: where none is given in a call.

    Raises:
        TypeError: what is no distance of gradbank's.
    """

    def __init__(self, distance: Distance, threshold: float | None = None) -> None:
        check_is((Distance,), distance, "MatchFinder: distance")
        self.distance = distance
        self.threshold = threshold

    def get_matching_pairs(
        self,
        query_emb: Tensor,
        ref_emb: Tensor | None = None,
        threshold: float | None = None,
        return_tuples: bool = False,
    ) -> Mask | list[tuple[int, int]]:
        """A `(Q, M)` numpy mask of `(Q, D)` queries and `(M, D)` references, the queries themselves by default.

        Args:
            return_tuples: list the matching `(q, r)` instead; the mask is then never held.
        """
        limit = self._limit(threshold)
        references = query_emb if ref_emb is None else ref_emb
        step = max(BUDGET // max(len(references), query_emb.shape[1]), 1)
        blocks: list[Mask] = []
        pairs: list[tuple[int, int]] = []
        with torch.no_grad(), _in_full(query_emb):
            for start in range(0, len(query_emb), step):
                mask = self._matches(self.distance(query_emb[start : start + step], references), limit)
                if return_tuples:
                    rows, columns = mask.nonzero(as_tuple=True)
                    pairs += zip((rows + start).tolist(), columns.tolist())
                else:
                    blocks.append(mask.cpu().numpy())
        if return_tuples:
            return pairs
        return np.concatenate(blocks) if blocks else np.zeros((0, len(references)), dtype=np.bool_)

    def is_match(self, x: Tensor, y: Tensor, threshold: float | None = None) -> bool | Mask:
        """Whether each row of `x`, `(N, D)`, matches the same row of `y`: a `(N,)` numpy mask, or a bool for one row.

        The same answer as `get_matching_pairs`, where PML compares embeddings that are not normalised. One row, or an
        embedding by itself, `(D,)`, is compared with all of the others.

        Raises:
            ValueError: numbers of rows that differ, none being 1, or dimensions that do.
        """
        limit = self._limit(threshold)
        x, y = (each[None] if each.ndim == 1 else each for each in (x, y))
        self.distance.check_shapes(x, y)
        if len(x) != len(y) and 1 not in (len(x), len(y)):
            raise ValueError(f"x and y must have as many rows, or one of them one row; got {len(x)} and {len(y)}")
        with torch.no_grad(), _in_full(x):
            x, y = self.distance.prepare(x), self.distance.prepare(y)
            rows = max(len(x), len(y)) if len(x) and len(y) else 0
            found = self.distance.pairs(x.expand(rows, -1), y.expand(rows, -1))
            matches = self._matches(found, limit)
        return bool(matches) if len(matches) == 1 else matches.cpu().numpy()

    def _matches(self, mat: Tensor, limit: float) -> Tensor:
        return mat >= limit if self.distance.is_inverted else mat <= limit

    def _limit(self, threshold: float | None) -> float:
        limit = self.threshold if threshold is None else threshold
        if limit is None:
            raise ValueError("there is no threshold: give one here, or to MatchFinder(distance, threshold)")
        return limit


def _in_full(rows: Tensor) -> torch.autocast:
    """Keeps autocast, which is meant for a network, from comparisons."""
    return torch.autocast(rows.device.type, enabled=False)
