"""The nearest neighbours of embeddings, found exactly and in bounded memory."""

import math
from collections.abc import Callable, Iterator
from os import PathLike

import torch
from torch import Tensor

from gradbank.distances import BatchedDistance, Distance

BUDGET = 1 << 21  # numbers that one block may hold: queries x references, or rows x dimension
FEWEST_QUERIES = 16  # in one block, however many references there are: fewer would leave the processor idle

Found = tuple[slice, Tensor, Tensor]  # these queries, their neighbours' distances, and which rows those are


class KNN:
    """Finds the `k` nearest references of each query; a subclass writes `chunks`.

    A calculator goes through `chunks`, so that it need not hold `queries x k` numbers.
    """

    def __call__(
        self, query: Tensor, k: int, reference: Tensor | None = None, ref_includes_query: bool = False
    ) -> tuple[Tensor, Tensor]:
        """`(Q, k)` distances and `(Q, k)` int64 rows of `reference`, the nearest first.

        Args:
            query: `(Q, D)`, and reference: `(M, D)`; without it, what was stored before.
            ref_includes_query: row i of the references is query i, which is not its own neighbour.
        """
        parts = list(self.chunks(query, k, reference, ref_includes_query))
        if not parts:
            return query.new_zeros(0, k), torch.zeros(0, k, dtype=torch.int64, device=query.device)
        return torch.cat([each[1] for each in parts]), torch.cat([each[2] for each in parts])

    def chunks(self, query: Tensor, k: int, reference: Tensor | None, ref_includes_query: bool) -> Iterator[Found]:
        """The same answer, some queries at a time and in order."""
        raise NotImplementedError(f"{type(self).__name__} must define chunks")


class StoringKNN(KNN):
    """One that can hold references of its own, as `FaissKNN` can, for `InferenceModel`; those given are not kept."""

    def __init__(self) -> None:
        self.reference: Tensor | None = None

    def given_or_stored(self, reference: Tensor | None) -> Tensor:
        """The references to look among.

        Raises:
            ValueError: none were given, and none are stored.
        """
        reference = self.reference if reference is None else reference
        if reference is None:
            raise ValueError("there are no references: pass reference=, or store some with train(embeddings)")
        return reference

    def train(self, embeddings: Tensor) -> None:
        """Stores `(M, D)` references in place of what was stored."""
        self.reset()
        self.add(embeddings)

    def add(self, embeddings: Tensor) -> None:
        """Stores `(M, D)` further references; their rows follow on those before."""
        new = torch.as_tensor(embeddings).detach()
        self.reference = new.clone() if self.reference is None else torch.cat([self.reference, new.to(self.reference)])

    def save(self, filename: "str | PathLike[str]") -> None:
        """Writes the stored references to a file.

        Raises:
            ValueError: there are none.
        """
        if self.reference is None:
            raise ValueError("there are no references to save: store some with train(embeddings)")
        torch.save(self.reference, filename)

    def load(self, filename: "str | PathLike[str]") -> None:
        """Stores the references that `save` wrote."""
        self.reference = torch.load(filename, weights_only=True, map_location="cpu")

    def reset(self) -> None:
        """Forgets the stored references."""
        self.reference = None


class ExactKNN(StoringKNN):
    """The exact neighbours by squared Euclidean distance, found with torch on the queries' device.

        d[q, r] = sum_k (q_k - r_k)^2, the lower row first where distances are equal

    Distances are computed in float64 and rounded to float32, so that copies of a row tie whatever their place.
    """

    def chunks(self, query: Tensor, k: int, reference: Tensor | None, ref_includes_query: bool) -> Iterator[Found]:
        return search(squared_euclidean, query, k, self.given_or_stored(reference), ref_includes_query)


class CustomKNN(StoringKNN):
    """The exact neighbours by any distance or similarity, the lower row first where they are equal.

    Unlike PML's it never holds the whole matrix, with or without `batch_size`.

    Args:
        distance: how queries and references are compared; of a `BatchedDistance` it is the one within, in its batches.
        batch_size: queries compared at a time; None is as many as fit a fixed block of memory.
    """

    def __init__(self, distance: Distance, batch_size: int | None = None) -> None:
        super().__init__()
        if isinstance(distance, BatchedDistance):
            batch_size = batch_size or distance.batch_size
            distance = distance.distance
        if not callable(distance) or isinstance(distance, type):
            raise TypeError(f"CustomKNN: distance must be a distance, as in LpDistance(), got {distance!r}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, or None, got {batch_size}")
        self.distance = distance
        self.batch_size = batch_size

    def chunks(self, query: Tensor, k: int, reference: Tensor | None, ref_includes_query: bool) -> Iterator[Found]:
        sign = -1 if self.distance.is_inverted else 1
        reference = self.given_or_stored(reference)
        found = search(
            lambda q, r: sign * self.distance(q, r), query, k, reference, ref_includes_query, self.batch_size
        )
        return ((rows, sign * values, indices) for rows, values, indices in found)


def search(
    compare: Callable[[Tensor, Tensor], Tensor],
    query: Tensor,
    k: int,
    reference: Tensor,
    ref_includes_query: bool,
    rows: int | None = None,
) -> Iterator[Found]:
    """The `k` references of each query for which `compare` gives the least, `rows` queries at a time.

    Raises:
        ValueError: `k` is below 1, or there are fewer references.
    """
    wanted, size = k + int(ref_includes_query), len(reference)
    if not 1 <= k <= wanted <= size:
        besides = " besides the query itself" if ref_includes_query else ""
        raise ValueError(f"k must be 1 to {size - wanted + k}, the number of references{besides}; got {k}")
    return _search(compare, query, wanted, reference, ref_includes_query, rows)


def _search(
    compare: Callable[[Tensor, Tensor], Tensor],
    query: Tensor,
    k: int,
    reference: Tensor,
    ref_includes_query: bool,
    rows: int | None,
) -> Iterator[Found]:
    size = len(reference)
    rows = rows or max(BUDGET // max(size, query.shape[1]), FEWEST_QUERIES)
    width = max(k, BUDGET // rows)
    for start in range(0, len(query), rows):
        block = query[start : start + rows]
        values, columns = nearest(_matrix(compare, block, reference[:width]), k)
        for first in range(width, size, width):
            more, further = nearest(_matrix(compare, block, reference[first : first + width]), k)
            values, columns = torch.cat([values, more], 1), torch.cat([columns, further + first], 1)
            # Stable: of equal ones the earlier tile's, whose rows are lower, come first.
            values, order = values.sort(dim=1, stable=True)
            values, columns = values[:, :k], columns.gather(1, order[:, :k])
        if ref_includes_query:
            values, columns = without_self(values, columns, start)
        yield slice(start, start + len(block)), values, columns


def nearest(mat: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` least numbers of each row (all, if it has fewer) and their columns: in order, equal ones by column."""
    if k >= mat.shape[1]:
        values, columns = mat.sort(dim=1, stable=True)
        return values, columns
    values, columns = mat.topk(k + 1, dim=1, largest=False)
    columns, last = columns[:, :k], values[:, k - 1 : k]
    tied = values[:, k] == last[:, 0]  # topk took any of those that equal the last: take the first of them
    if bool(tied.any()):
        rows, last = mat[tied], last[tied]
        below, at = rows < last, rows == last
        room = k - below.sum(1, keepdim=True)
        kept = below | (at & (at.cumsum(1) <= room))
        columns[tied] = kept.nonzero()[:, 1].view(-1, k)
    columns = columns.sort(dim=1).values
    values, order = mat.gather(1, columns).sort(dim=1, stable=True)
    return values, columns.gather(1, order)


def without_self(values: Tensor, columns: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Each row without its own query, whose column is `first` for the first row; without its last one if that is none.

    The query is told by its column: where others are just as near it need not come first, or at all.
    """
    own = columns == torch.arange(first, first + len(columns), device=columns.device)[:, None]
    own[:, -1] |= ~own.any(1)
    shape = len(columns), columns.shape[1] - 1
    return values[~own].view(shape), columns[~own].view(shape)


def _matrix(compare: Callable[[Tensor, Tensor], Tensor], block: Tensor, reference: Tensor) -> Tensor:
    """`compare` of a block with many references, of which only some are converted or normalised at a time: in full
    precision, for autocast is meant for a network."""
    step = max(BUDGET // max(reference.shape[1], 1), 1)
    wide = torch.promote_types(block.dtype, reference.dtype)
    with torch.autocast(block.device.type, enabled=False):
        block, starts = block.to(wide), range(0, len(reference), step)
        parts = [compare(block, reference[start : start + step].to(block)) for start in starts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def squared_euclidean(queries: Tensor, references: Tensor) -> Tensor:
    x, y = queries.double(), references.double()
    if len(x):  # from the first one on, for rows may lie close together and far away
        x, y = x - x[:1], y - x[:1]
    squares = (x * x).sum(1)[:, None] + (y * y).sum(1)
    # what a row and its copy may seem to be apart: of D roundings the most cancel each other
    rounding = squares * (8 * math.sqrt(x.shape[1]) * torch.finfo(x.dtype).eps)
    made = squares.addmm_(x, y.mT, alpha=-2)
    return made.masked_fill_(made <= rounding, 0).float()
