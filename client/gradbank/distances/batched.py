"""Distances taken some queries at a time."""

from dataclasses import field
from typing import Any

from torch import Tensor

from gradbank.component import component
from gradbank.distances.base import Distance


@component
class BatchedDistance(Distance):
    """Hands `distance` the queries in batches, each of whose matrices goes to `iter_fn` and is then forgotten.

    Args:
        distance: what measures; its attributes are this one's too.
        iter_fn: called with `(matrix, start, end)`, the `(end - start, M)` distances of those queries. A function
            cannot be sent to a server.
        batch_size: queries at a time.
    """

    distance: Distance
    iter_fn: Any = field(default=None, metadata={"wire": False})
    batch_size: int = 32
    normalize_embeddings: bool = field(default=True, init=False)
    p: float = field(default=2, init=False)
    power: float = field(default=1, init=False)
    is_inverted: bool = field(default_factory=bool, init=False)

    def __post_init__(self) -> None:
        for name in ("normalize_embeddings", "p", "power", "is_inverted"):
            setattr(self, name, getattr(self.distance, name))
        if self.collect_stats is None:
            self.collect_stats = self.distance.collect_stats

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> None:  # type: ignore[override]  # as in PML
        """Calls `iter_fn` with the distances of each batch of `(B, D)` queries, and returns nothing."""
        ref_emb = query_emb if ref_emb is None else ref_emb
        for start in range(0, len(query_emb), self.batch_size):
            end = min(start + self.batch_size, len(query_emb))
            self.iter_fn(self.distance(query_emb[start:end], ref_emb), start, end)
        for each in (self.distance, self):  # of all queries, rather than of the last batch
            each.record(query_emb, (ref_emb,))

    def prepare(self, embeddings: Tensor) -> Tensor:
        return self.distance.prepare(embeddings)

    def maybe_normalize(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
        return self.distance.maybe_normalize(embeddings, dim=dim, **kwargs)

    def _measured(self, embeddings: Tensor) -> Tensor:
        return self.distance._measured(embeddings)

    def matrix(self, queries: Tensor, references: Tensor) -> Tensor:
        return self.distance.matrix(queries, references)

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        return self.distance.pairs(queries, references)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return self.distance.pairwise_distance(query_emb, ref_emb)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "distance":
                raise
            return getattr(self.distance, name)
