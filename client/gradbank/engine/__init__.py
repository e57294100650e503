"""How a declared loss is evaluated: the same declaration, by whichever engine fits.

`dense` holds the whole matrix; `tiled` computes value and gradient together in bounded memory. The first is
quicker where the matrix is small, and what statistics make of it, and is chosen there; `using` forces a choice for a
block of code.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradbank.engine.anchors import Anchors, Gathered, Part, Positives
from gradbank.engine.counting import count
from gradbank.engine.declaration import Declaration, statistics_of
from gradbank.engine.dense import dense, listed
from gradbank.engine.each import every_pair, every_positive, triplets_of
from gradbank.engine.eager import at_once, eager
from gradbank.engine.functions import Linear, Ramp, Sloped
from gradbank.engine.hinge import Hinge
from gradbank.engine.indices import Indices, as_pairs, as_triplets, check_indices, named_weight
from gradbank.engine.logsumexp import LogSumExp
from gradbank.engine.mined import ChosenPairs, Limits, MinedPairs
from gradbank.engine.named import is_of_triplets, listed_distances, of_triplets
from gradbank.engine.pairs import JoinedPairs, LabelledPairs, ListedPairs, Pairs
from gradbank.engine.precision import full_precision, widened
from gradbank.engine.references import References
from gradbank.engine.room import room, whole
from gradbank.engine.separable import Separable
from gradbank.engine.statistics import EveryPair, Running, Statistic
from gradbank.engine.sums import Each, Number, Sum
from gradbank.engine.sweep import sweep
from gradbank.engine.thresholds import Buckets, first_not_above
from gradbank.engine.tiled import Bounds, tiled
from gradbank.engine.triplets import Triplets

__all__ = [
    "Anchors",
    "Bounds",
    "Buckets",
    "ChosenPairs",
    "Declaration",
    "Each",
    "EveryPair",
    "Gathered",
    "Hinge",
    "Indices",
    "JoinedPairs",
    "LabelledPairs",
    "Limits",
    "Linear",
    "ListedPairs",
    "LogSumExp",
    "MinedPairs",
    "Number",
    "Pairs",
    "Part",
    "Positives",
    "Ramp",
    "References",
    "Running",
    "Separable",
    "Sloped",
    "Statistic",
    "Sum",
    "Triplets",
    "as_pairs",
    "as_triplets",
    "at_once",
    "check_indices",
    "evaluate",
    "evaluate_triplets",
    "every_pair",
    "every_positive",
    "first_not_above",
    "forced",
    "full_precision",
    "is_of_triplets",
    "listed_distances",
    "look",
    "named_weight",
    "room",
    "sweep",
    "triplets_of",
    "using",
    "widened",
]

_forced: ContextVar[tuple[str, Bounds | None]] = ContextVar("engine", default=("auto", None))


@contextmanager
def using(engine: str, bounds: Bounds | None = None) -> Iterator[None]:
    """Forces `"dense"` or `"tiled"` (with other bounds, if given) inside a `with` block; `"auto"` is the default.

    Raises:
        ValueError: no such engine.
    """
    if engine not in ("auto", "dense", "tiled"):
        raise ValueError(f"no engine is called {engine!r}; known are auto, dense, tiled")
    token = _forced.set((engine, bounds))
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str:
    """Which engine `using` forces here, or "auto"."""
    return _forced.get()[0]


def evaluate(
    loss: Declaration,
    embeddings: Tensor,
    references: References,
    pairs: Pairs,
    learned: Sequence[Tensor] = (),
) -> Any:
    """The loss of `(B, D)` embeddings, `widened`, against references: a scalar that backpropagates to both.

    Args:
        learned: parameters of the loss, to which it backpropagates too.
    """
    if loss.reducer.needs_list:
        return listed(loss, embeddings, references, pairs)
    engine, bounds = _forced.get()
    if engine == "auto":
        engine = "dense" if _is_small(loss, embeddings, references, pairs) else "tiled"

    def in_tiles(inputs: tuple[Tensor, ...], needed: tuple[bool, ...]) -> tuple[Tensor, list[Tensor | None]]:
        given = replace(references, pieces=inputs[1 : 1 + len(references.pieces)])
        return tiled(loss, inputs[0], given, pairs, list(learned), needed, bounds)

    if engine == "dense":
        value = dense(loss, embeddings, references, pairs)
    else:
        value = eager(in_tiles, (embeddings, *references.pieces, *learned), owned=True)
    if loss.reducer.collects:
        count(loss, lambda counting: look(counting, embeddings, references, pairs))
    return value


@torch.no_grad()
def look(loss: Declaration, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
    """`evaluate` without gradients, for what is only to be known."""
    return evaluate(loss, embeddings.detach(), references.detach(), pairs)


def evaluate_triplets(
    loss: Declaration,
    embeddings: Tensor,
    references: References,
    triplets: tuple[Tensor, Tensor, Tensor],
    labels: Tensor | None = None,
) -> Any:
    """The loss of triplets `(a, p, n)` that were named one by one, as `evaluate`."""
    value = of_triplets(loss, embeddings, references, triplets, labels)
    if loss.reducer.collects and not loss.reducer.needs_list:
        rows, others = embeddings.detach(), references.detach()
        count(loss, lambda counting: evaluate_triplets(counting, rows, others, triplets, labels))
    return value


def _is_small(loss: Declaration, embeddings: Tensor, references: References, pairs: Pairs) -> bool:
    """Whether the matrix is worth holding whole, and with it a row for each positive, where a statistic wants that."""
    width, most = len(references) * references.vectors, whole(embeddings.device)
    entries = len(embeddings) * width
    if entries <= 2**12 or entries > most:
        return entries <= 2**12
    nothing, place = Positives.none(embeddings), slice(0, len(embeddings))
    anchors = Anchors(len(embeddings), pairs.anchor_labels, embeddings.detach(), nothing, place=place)
    with torch.no_grad():
        wanted = statistics_of(loss, anchors).values()
    return not any(each.makes_rows for each in wanted) or int(pairs.most_positives().sum()) * width <= most
