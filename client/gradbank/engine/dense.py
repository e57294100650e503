"""The whole matrix at once, differentiated by autograd: the readable reference, and the quickest for small batches."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradbank.engine.anchors import Anchors, Positives
from gradbank.engine.declaration import Declaration, parts_of, statistics_of
from gradbank.engine.indices import unflattened
from gradbank.engine.pairs import Pairs
from gradbank.engine.references import References
from gradbank.engine.statistics import EveryPair
from gradbank.reducers import Ratio

LISTED_AT_MOST = 2**26  # losses that a reducer which wants a list may be given


def dense(loss: Declaration, embeddings: Tensor, references: References, pairs: Pairs) -> Tensor:
    """The loss of `(B, D)` embeddings; memory grows as `B * M`, or worse where a statistic says so."""
    s, anchors, negatives = _whole(loss, embeddings, references, pairs)
    found = {}
    for name, wanted in statistics_of(loss, anchors).items():
        wanted.reduced_by(loss.reducer.of(name))
        found[name] = wanted.dense(s, negatives, anchors.positives)
    anchors = replace(anchors, found=found)
    parts = (anchors.reduce(part, loss.reducer.of(name)) for name, part in parts_of(loss, anchors).items())
    return Ratio.total(parts).to(embeddings.dtype)


def listed(loss: Declaration, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
    """What a reducer that must see every loss makes of them: each is listed, with its indices.

    Raises:
        ValueError: more losses than can be listed.
    """
    s, anchors, negatives = _whole(loss, embeddings, references, pairs)
    _check_number(loss, s.numel(), "pairs")
    a2, n = negatives.nonzero(as_tuple=True)
    if negatives.dtype != torch.bool:
        times = negatives[a2, n].long()
        a2, n = a2.repeat_interleave(times), n.repeat_interleave(times)
    p = anchors.positives
    times = p.times.long()
    p = Positives(*(x.repeat_interleave(times) for x in (p.s, p.anchor, p.times, p.other)))
    anchors = replace(anchors, positives=p._replace(times=torch.ones_like(p.times)))
    pair = EveryPair(p.anchor, p.other, a2, n)
    found = {}
    for name, wanted in statistics_of(loss, anchors).items():
        found[name] = wanted.listed(s, pair) or wanted.dense(s, negatives, p)
    anchors = replace(anchors, found=found)
    parts = {name: anchors.listing(part) for name, part in parts_of(loss, anchors).items()}
    return loss.reducer(parts, embeddings, anchors.labels)


def _whole(
    loss: Declaration, embeddings: Tensor, references: References, pairs: Pairs
) -> tuple[Tensor, Anchors, Tensor]:
    """The `(B, M)` matrix, the anchors with their positives, and which entries are negatives."""
    rows, columns = slice(0, len(embeddings)), slice(0, len(references))
    whole = references.whole().to(embeddings.dtype)
    queries = loss.distance.prepare(embeddings)
    s = loss.distance.matrix(queries, queries if whole is embeddings else loss.distance.prepare(whole))
    flat, counts, negatives = pairs.tile(rows, columns)
    row, column = unflattened(flat, len(whole))
    times = torch.ones_like(flat, dtype=s.dtype) if counts is None else counts.to(s.dtype)
    positives = Positives(s.reshape(-1)[flat], row, times, column)
    labels, weight = pairs.anchor_labels, pairs.anchor_weight
    anchors = Anchors(
        len(embeddings), labels, embeddings, positives, references.are_anchors, weight, rows, pairs.interval
    )
    return s, anchors, negatives


def _check_number(loss: Declaration, number: int, what: str) -> None:
    if number > LISTED_AT_MOST:
        raise ValueError(
            f"{type(loss.reducer).__name__} wants every loss listed, and there are {number} {what}, more than "
            f"{LISTED_AT_MOST}: use a reducer of gradbank's, a smaller bank or a miner"
        )
