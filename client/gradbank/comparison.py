"""A batch against a queue: which losses can be computed so, and of which pairs."""

from typing import Any

import torch
from torch import Tensor

from gradbank.component import Component
from gradbank.engine import (
    ChosenPairs,
    EveryPair,
    Indices,
    JoinedPairs,
    LabelledPairs,
    ListedPairs,
    Pairs,
    References,
    as_pairs,
    check_indices,
    every_pair,
    named_weight,
    triplets_of,
)
from gradbank.losses.base import BaseMetricLossFunction
from gradbank.losses.loss import Loss
from gradbank.miners.base import Miner
from gradbank.miners.triplets import TripletMarginMiner


def compares(loss: type[Component]) -> bool:
    """Whether a loss compares with references, and remembers nothing, to which only a call of it would see."""
    return issubclass(loss, BaseMetricLossFunction) and loss.takes_references and loss.stage is Loss.stage


def compared(
    loss: BaseMetricLossFunction,
    miner: Miner | None,
    embeddings: Tensor,
    labels: Tensor,
    references: References,
    own: Tensor | None,
    indices: Indices | None,
) -> Any:
    """The loss of a batch against a queue, of the pairs that labels make, a miner chooses and indices name.

    Args:
        own: `(B,)` where the batch's rows are in the queue; None where they are not.
        indices: pairs within the batch, in addition to all others.
    """
    assert references.labels is not None
    shape = (len(embeddings), len(references))
    given = None if indices is None or own is None else _in_queue(indices, own)
    once = not loss.counts_repeats
    pairs: Pairs = LabelledPairs(labels, references.labels, own)
    takes_interval = loss.takes_interval and indices is None
    # what a miner chooses from: each anchor's own row is a positive, as in PML; to the loss it is not
    seen = LabelledPairs(labels, references.labels)
    if (
        takes_interval
        and isinstance(miner, TripletMarginMiner)
        and not miner.overrides("interval")
        and miner.distance.measures_as(loss.distance)
    ):
        pairs.interval = seen.interval = miner.interval
        miner.distance.record(embeddings, references.pieces)
        if miner.collect_stats:
            miner.watch(embeddings, references, seen)
    elif miner is not None:
        chosen = miner.chosen_of(embeddings, references, seen)
        if miner.collect_stats and isinstance(chosen, Pairs):
            miner.watch(embeddings, references, chosen)
        if not isinstance(chosen, Pairs):
            a, p, n = chosen
            if own is not None:
                a, p, n = (index[p != own[a]] for index in (a, p, n))
            if indices is None and loss.use_of_indices == "pairs":
                return loss.compare_listed(embeddings, references, (a, p, n), labels)
            # as pairs they would be more than were chosen
            if given is not None and loss.keeps_triplets(embeddings, references, labels):
                triplets = tuple(map(torch.cat, zip((a, p, n), _as_triplets(given), strict=True)))
                return loss.compare_listed(embeddings, references, triplets, labels)
            chosen = ListedPairs((a, p, a, n), shape, once)
        pairs = ChosenPairs(pairs, chosen)
    if given is not None:
        listed = ListedPairs(as_pairs(given, embeddings.device), shape, once)
        pairs = JoinedPairs(pairs, listed, once)
    if loss.use_of_indices == "weights" and miner is None and indices is None:
        pairs = LabelledPairs(labels, references.labels, None if loss.sees_own else own)
    elif loss.use_of_indices == "weights":
        named = tuple(every_pair(pairs, len(embeddings), references))
        weight = named_weight(named, embeddings, anchors_only=True)
        pairs = LabelledPairs(labels, references.labels, None if loss.sees_own else own, anchor_weight=weight)
    return loss.compare(embeddings, references, pairs)


def _in_queue(indices: Indices, own: Tensor) -> Indices:
    """Pairs or triplets within a batch, as those of the batch with a queue.

    Args:
        own: `(B,)` where the batch's rows entered the queue.

    Raises:
        ValueError: an index outside the batch.
    """
    a1, p, a2, n = as_pairs(indices, own.device)
    for kind, index in (("anchor", a1), ("positive", p), ("anchor", a2), ("negative", n)):
        check_indices(kind, index, len(own))
    return (a1, own[p], own[n]) if len(indices) == 3 else (a1, own[p], a2, own[n])


def _as_triplets(indices: Indices) -> Indices:
    """Triplets, or pairs joined on equal anchors."""
    return indices if len(indices) == 3 else triplets_of(EveryPair(*indices))
