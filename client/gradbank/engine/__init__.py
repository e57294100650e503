"""How a declared loss is evaluated: the same declaration, by whichever engine fits.

`dense` holds the whole matrix; `tiled` computes value and gradient together in bounded memory. The first is
quicker where the matrix fits a tile anyway, and is chosen there; `using` forces a choice for a block of code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

from gradbank.engine.anchors import Anchors, Gathered, Positives
from gradbank.engine.below import Below, first_not_above
from gradbank.engine.block import sweep
from gradbank.engine.declaration import Declaration
from gradbank.engine.dense import dense
from gradbank.engine.eager import by_autograd, eager
from gradbank.engine.indices import Indices, as_pairs, as_triplets, check_indices
from gradbank.engine.listed import listed_distances
from gradbank.engine.pairs import JoinedPairs, LabelledPairs, ListedPairs, MinedPairs, Pairs
from gradbank.engine.precision import full_precision, widened
from gradbank.engine.references import References
from gradbank.engine.statistics import LogSumExp, Reduced, Statistic
from gradbank.engine.tiled import Bounds, tiled

__all__ = [
    "Anchors",
    "Below",
    "Bounds",
    "Declaration",
    "Gathered",
    "Indices",
    "JoinedPairs",
    "LabelledPairs",
    "ListedPairs",
    "LogSumExp",
    "MinedPairs",
    "Pairs",
    "Positives",
    "Reduced",
    "References",
    "Statistic",
    "as_pairs",
    "as_triplets",
    "check_indices",
    "evaluate",
    "first_not_above",
    "full_precision",
    "listed_distances",
    "sweep",
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


def evaluate(loss: Declaration, embeddings: Tensor, references: References, pairs: Pairs) -> Tensor:
    """The loss of `(B, D)` embeddings, `widened`, against references, as a scalar that backpropagates to both."""
    engine, bounds = _forced.get()
    if engine == "auto":
        engine = "dense" if _fits_a_tile(loss, len(embeddings), len(references)) else "tiled"

    def with_inputs(inputs: tuple[Tensor, ...]) -> tuple[Tensor, References]:
        return inputs[0], References(inputs[1:], references.labels)

    def in_tiles(inputs: tuple[Tensor, ...], needed: tuple[bool, ...]) -> tuple[Tensor, list[Tensor]]:
        return tiled(loss, *with_inputs(inputs), pairs, needed, bounds)

    whole = by_autograd(lambda inputs: dense(loss, *with_inputs(inputs), pairs))
    return eager(whole if engine == "dense" else in_tiles, (embeddings, *references.pieces))


def _fits_a_tile(loss: Declaration, anchors: int, references: int) -> bool:
    """Whether the whole matrix is no larger than a tile, and no statistic needs more than the matrix."""
    small = anchors * references <= Bounds().tile
    return small and not any(statistic.needs_positives for statistic in loss.negatives().values())
