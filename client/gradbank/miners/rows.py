"""Anchors against all references, a block of anchors at a time."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gradbank.distances import Distance
from gradbank.engine import full_precision, room, widened

ENTRIES = 2**18  # of the matrix held at a time, unless a single row has more


class Rows(NamedTuple):
    """A block of `b` rows of the matrix between anchors and references."""

    rows: slice
    d: Tensor  # (b, M) distances, or similarities
    positives: Tensor  # (b, M) bool
    negatives: Tensor  # (b, M) bool


def blocks(anchors: int, references: int, device: torch.device) -> Iterator[slice]:
    """Blocks of anchors whose rows, at full width, have `ENTRIES` together, or more on a GPU."""
    step = max(1, room(ENTRIES, device) // max(references, 1))
    for start in range(0, anchors if references else 0, step):
        yield slice(start, min(start + step, anchors))


def kinds(labels: Tensor, ref_labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Which references are positives, and which negatives, of some anchors: `(b, M)` bool each."""
    same = labels[rows, None] == ref_labels
    negatives = ~same
    if labels is ref_labels:  # the batch itself
        same.diagonal(rows.start).fill_(False)
    return same, negatives


def matrix(
    distance: Distance, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
) -> Iterator[Rows]:
    """The matrix between anchors and references, block by block, with the kind of each pair."""
    device = embeddings.device
    distance.record(embeddings, (ref_emb,))
    with torch.no_grad(), full_precision(device):
        queries = distance.prepare(widened(embeddings))
        references = queries if ref_emb is embeddings else distance.prepare(widened(ref_emb))
    for rows in blocks(len(queries), len(references), device):
        with torch.no_grad(), full_precision(device):
            d = distance.matrix(queries[rows], references)
        yield Rows(rows, d, *kinds(labels, ref_labels, rows))
