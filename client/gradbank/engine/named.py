"""Pairs and triplets that are named one by one, and only their distances computed."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gradbank.distances import Distance
from gradbank.engine.anchors import Anchors, Positives
from gradbank.engine.declaration import Declaration
from gradbank.engine.references import References
from gradbank.engine.triplets import Triplets

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
        return distance.pairs(queries.index_select(0, a), rows.index_select(0, b))

    chunks = zip(torch.split(anchors, CHUNK), torch.split(others, CHUNK))
    made = [checkpoint(of_chunk, a, b, queries, rows, use_reentrant=False) for a, b in chunks]
    return torch.cat(made)  # split gives one empty chunk for no pairs


def of_triplets(
    loss: Declaration,
    embeddings: Tensor,
    references: References,
    triplets: tuple[Tensor, Tensor, Tensor],
    labels: Tensor | None,
) -> Any:
    """A loss whose statistics are all of triplets, over `(a, p, n)`: differentiable, in memory of `O(T)`."""
    a, p, n = triplets
    near = listed_distances(loss.distance, embeddings, references, a, p)
    far = listed_distances(loss.distance, embeddings, references, a, n)
    none = near[:0]
    nothing = Positives(none, none.long(), none, none.long())
    place = slice(0, len(embeddings))
    anchors = Anchors(len(embeddings), labels, embeddings, nothing, references.are_anchors, place=place)
    found = {}
    for name, statistic in loss.negatives(anchors).items():
        assert isinstance(statistic, Triplets)
        statistic.reduced_by(loss.reducer.of(name))
        found[name] = statistic.of_list(near, far, triplets, len(embeddings))
    anchors = replace(anchors, found=found)
    parts = loss.terms(anchors)
    if loss.reducer.needs_list:
        return loss.reducer({name: anchors.listing(part) for name, part in parts.items()}, embeddings, labels)
    values = [anchors.reduce(part, loss.reducer.of(name)).value() for name, part in parts.items()]
    return torch.stack(values).sum().to(embeddings.dtype)
