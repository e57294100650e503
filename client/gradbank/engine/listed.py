"""Distances of pairs that are named one by one."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gradbank.distances import Distance
from gradbank.engine.references import References

CHUNK = 2**16  # pairs whose two vectors are held at a time


def listed_distances(
    distance: Distance, embeddings: Tensor, references: References, anchors: Tensor, others: Tensor
) -> Tensor:
    """The distance of each `(anchors[i], others[i])`: `(P,)`, differentiable, in memory of `O(P)`.

    The vectors are gathered a chunk at a time and gathered again in the backward pass.
    """
    queries = distance.prepare(embeddings)
    rows = distance.prepare(references.whole().to(embeddings.dtype))

    def of_chunk(a: Tensor, b: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
        return distance.pairs(queries[a], rows[b])

    chunks = zip(torch.split(anchors, CHUNK), torch.split(others, CHUNK))
    made = [checkpoint(of_chunk, a, b, queries, rows, use_reentrant=False) for a, b in chunks]
    return torch.cat(made)  # split gives one empty chunk for no pairs
