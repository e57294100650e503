"""Pairs and triplets that are named one by one, and only their distances computed."""

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gradbank.distances import Distance
from gradbank.engine.anchors import Anchors, Positives
from gradbank.engine.declaration import Declaration, parts_of, statistics_of
from gradbank.engine.references import References
from gradbank.engine.room import room
from gradbank.engine.triplets import Triplets

CHUNK = 2**16  # pairs whose two vectors are held at a time
_ENTRIES = 2**22  # of a matrix that is held at a time
_ENTRIES_FOR_A_PAIR = 32  # in the time that it takes to gather the two vectors of one


def listed_distances(
    distance: Distance, embeddings: Tensor, references: References, anchors: Tensor, others: Tensor
) -> Tensor:
    """The distance of each `(anchors[i], others[i])`: `(P,)`, differentiable, in memory of `O(P)`.

    Many are looked up in the matrix, a few million entries of which are made at a time; so are those of a distance of
    one's own, which is its matrix. Of few the vectors are gathered, a chunk at a time. What is not held is made again
    in the backward pass.
    """
    queries = distance.prepare(embeddings)
    rows = distance.prepare(references.whole().to(embeddings.dtype))
    is_dense = len(queries) * len(rows) <= _ENTRIES_FOR_A_PAIR * len(anchors)
    if len(anchors) and (is_dense or distance.is_its_matrix):
        return _looked_up(distance, queries, rows, anchors, others)

    def of_chunk(a: Tensor, b: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
        return distance.pairs(queries.index_select(0, a), rows.index_select(0, b))

    chunks = zip(torch.split(anchors, CHUNK), torch.split(others, CHUNK))
    made = [checkpoint(of_chunk, a, b, queries, rows, use_reentrant=False) for a, b in chunks]
    return torch.cat(made)  # split gives one empty chunk for no pairs


def _looked_up(distance: Distance, queries: Tensor, rows: Tensor, anchors: Tensor, others: Tensor) -> Tensor:
    def of_block(start: int, stop: int, a: Tensor, b: Tensor, queries: Tensor, rows: Tensor) -> Tensor:
        s = distance.matrix(queries[start:stop], rows)
        return s.reshape(-1).index_select(0, (a - start) * len(rows) + b)

    step = max(1, room(_ENTRIES, queries.device) // len(rows))
    if step >= len(queries):
        return of_block(0, len(queries), anchors, others, queries, rows)
    anchor, order = anchors.sort(stable=True)
    edges = torch.arange(0, len(queries) + step, step, device=anchor.device)
    bounds = torch.searchsorted(anchor, edges).tolist()
    made = [
        checkpoint(
            of_block, i * step, (i + 1) * step, anchor[lo:hi], others[order[lo:hi]], queries, rows, use_reentrant=False
        )
        for i, (lo, hi) in enumerate(itertools.pairwise(bounds))
        if lo < hi
    ]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return torch.cat(made).index_select(0, back)


def of_triplets(
    loss: Declaration,
    embeddings: Tensor,
    references: References,
    triplets: tuple[Tensor, Tensor, Tensor],
    labels: Tensor | None,
) -> Any:
    """A loss whose statistics are all of triplets, over `(a, p, n)`: differentiable, in memory of `O(T)`."""
    a, p, n = triplets
    near, far = listed_distances(loss.distance, embeddings, references, a.repeat(2), torch.cat([p, n])).chunk(2)
    anchors = _without_positives(embeddings, references, labels)
    found = {}
    for name, statistic in statistics_of(loss, anchors).items():
        assert isinstance(statistic, Triplets)
        statistic.reduced_by(loss.reducer.of(name))
        found[name] = statistic.of_list(near, far, triplets, len(embeddings))
    anchors = replace(anchors, found=found)
    parts = parts_of(loss, anchors)
    if loss.reducer.needs_list:
        return loss.reducer({name: anchors.listing(part) for name, part in parts.items()}, embeddings, labels)
    values = [anchors.reduce(part, loss.reducer.of(name)).value() for name, part in parts.items()]
    return torch.stack(values).sum().to(embeddings.dtype)


def is_of_triplets(loss: Declaration, embeddings: Tensor, references: References, labels: Tensor | None) -> bool:
    """Whether a loss is written on triplets and on nothing else: only then can these be named one by one."""
    anchors = _without_positives(embeddings, references, labels)
    wanted = statistics_of(loss, anchors)
    if not wanted or not all(isinstance(each, Triplets) for each in wanted.values()):
        return False
    none, nobody = embeddings.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=embeddings.device)
    with torch.no_grad():
        found = {
            name: each.of_list(none, none, (nobody, nobody, nobody), len(embeddings))
            for name, each in wanted.items()
            if isinstance(each, Triplets)
        }
        parts = parts_of(loss, replace(anchors, found=found))
    return all(part.kind == "triplet" for part in parts.values())


def _without_positives(embeddings: Tensor, references: References, labels: Tensor | None) -> Anchors:
    place, nothing = slice(0, len(embeddings)), Positives.none(embeddings)
    return Anchors(len(embeddings), labels, embeddings, nothing, references.are_anchors, place=place)
