"""Queries and the references that they are looked for among."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradbank.checks import check_finite
from gradbank.evaluation.labels import Answers
from gradbank.evaluation.metrics import SCORES
from gradbank.evaluation.neighbors import KNN, Found

Array = Tensor | np.ndarray[Any, Any] | Sequence[Any]
KNNFunction = Callable[[Tensor, int, Tensor, bool], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Queries `(Q, D)` and references `(M, D)`, float32, with labels `(Q,)` and `(M,)`, or `(Q, L)` and `(M, L)`."""

    query: Tensor
    query_labels: Tensor
    reference: Tensor
    reference_labels: Tensor
    ref_includes_query: bool

    @classmethod
    def of(
        cls,
        query: Array,
        query_labels: Array,
        reference: Array | None,
        reference_labels: Array | None,
        ref_includes_query: bool,
        device: torch.device,
        numbered: bool = True,
    ) -> "Retrieval":
        """Checks them, and takes the queries for references where there are none.

        Args:
            numbered: whether labels may be told by their places among all labels.

        Raises:
            ValueError: lengths that differ, NaN or infinity, or first references that are not the queries.
        """
        if (reference is None) != (reference_labels is None):
            raise ValueError("reference and reference_labels belong together: give both, or neither")
        x, labels = _embeddings("query", query, device), _labels(query_labels, device)
        y, known = x, labels
        if reference is not None and reference_labels is not None:
            y, known = _embeddings("reference", reference, device), _labels(reference_labels, device)
        for name, rows, each in (("query", x, labels), ("reference", y, known)):
            if not len(rows) == len(each) > 0:
                raise ValueError(f"{name} must have one label per row and a row at least, got {len(rows)}, {len(each)}")
        if x.shape[1] != y.shape[1] or labels.shape[1:] != known.shape[1:]:
            raise ValueError(
                f"queries and references must be alike, got embeddings of shape {tuple(x.shape)} and {tuple(y.shape)}, "
                f"labels of shape {tuple(labels.shape)} and {tuple(known.shape)}"
            )
        labels, known = _comparable(labels, known, numbered)
        included = (
            len(x) <= len(y) and torch.allclose(x, y[: len(x)]) and torch.allclose(labels, known[: len(x)])
            if ref_includes_query and y is not x
            else True
        )
        if not included:
            raise ValueError(
                f"with ref_includes_query the first {len(x)} references, and their labels, must be the queries"
            )
        return cls(x, labels, y, known, ref_includes_query or reference is None)

    @property
    def others(self) -> int:
        """How many references each query has, itself left out."""
        return len(self.reference) - int(self.ref_includes_query)

    def chunks(self, knn_func: KNN | KNNFunction, k: int) -> Iterator[Found]:
        """The `k` nearest references of the queries, some at a time if `knn_func` can."""
        if k == 0:
            yield slice(0, len(self.query)), *self.neighbors(knn_func, 0)
        elif isinstance(knn_func, KNN) and type(knn_func).__call__ is KNN.__call__:
            yield from knn_func.chunks(self.query, k, self.reference, self.ref_includes_query)
        else:
            yield slice(0, len(self.query)), *self.neighbors(knn_func, k)

    def neighbors(self, knn_func: KNN | KNNFunction, k: int) -> tuple[Tensor, Tensor]:
        """`(Q, k)` distances and rows of the nearest references of all queries."""
        if k == 0:
            none = self.query.new_zeros(len(self.query), 0)
            return none, none.long()
        return knn_func(self.query, k, self.reference, self.ref_includes_query)

    def scores(self, names: Iterable[str], found: Iterable[Found], answers: Answers) -> dict[str, Tensor]:
        """Each of these metrics for the queries that have an answer, in order; `found` are all queries' neighbours."""
        has_answer = answers.relevant > 0
        # Made beforehand: small results kept between large blocks would keep the freed blocks from being used again.
        scores = {name: self.query.new_zeros(int(has_answer.sum()), dtype=torch.float64) for name in names}
        done = 0
        for rows, _, indices in found:
            asked = has_answer[rows]
            if bool(asked.any()):
                matches, relevant = answers.among(rows, indices)[asked], answers.relevant[rows][asked]
                for name, each in scores.items():
                    each[done : done + len(relevant)] = SCORES[name](matches, relevant)
                done += len(relevant)
        return scores


def _embeddings(name: str, array: Array, device: torch.device) -> Tensor:
    rows = torch.as_tensor(array).detach().to(device, torch.float32)
    if rows.ndim != 2:
        raise ValueError(f"{name} must be (rows, dimension), got shape {tuple(rows.shape)}")
    check_finite(rows, name)
    return rows


def _labels(array: Array, device: torch.device) -> Tensor:
    try:
        labels = torch.as_tensor(array).to(device)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"labels must be numbers, {error}: number yours, by np.unique(..., return_inverse=True)"
        ) from None
    if labels.dtype in (torch.uint16, torch.uint32):  # of which torch knows little
        labels = labels.to(torch.int64)
    elif labels.dtype == torch.uint64:
        labels = labels.view(torch.int64)  # told apart all the same
    if labels.ndim not in (1, 2):
        raise ValueError(f"labels must be (rows,) or (rows, parts), got shape {tuple(labels.shape)}")
    return labels


def _comparable(labels: Tensor, known: Tensor, numbered: bool) -> tuple[Tensor, Tensor]:
    """Labels as comparisons want them, floats: float32, as in PML, unless that would run some together."""
    largest = max(
        (abs(int(end)) for each in (labels, known) if not _is_float(each) for end in each.aminmax()), default=0
    )
    if largest > _EXACT[torch.float64] and numbered:
        rows = torch.cat([labels, known])
        labels, known = torch.unique(rows, return_inverse=True)[1].split([len(labels), len(known)])
    floats = [each for each in (labels, known) if each.is_floating_point()]
    wide = all(each.dtype == torch.float64 for each in floats) and any(bool((f != f.float()).any()) for f in floats)
    dtype = torch.float32 if largest <= _EXACT[torch.float32] and not wide else torch.float64
    return labels.to(dtype), known.to(dtype)


def _is_float(labels: Tensor) -> bool:
    return labels.is_floating_point() or labels.dtype == torch.bool


_EXACT = {torch.float32: 2**24, torch.float64: 2**53}  # the integers that these tell apart
