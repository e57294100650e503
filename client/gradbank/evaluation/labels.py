"""Which references are right answers to which queries."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradbank.evaluation.neighbors import BUDGET

Comparison = Callable[[Tensor, Tensor], Tensor]
Counts = tuple[Tensor, Tensor]  # the distinct query labels in order, and how many references match each

EQUALITY: Comparison = torch.eq


def get_label_match_counts(query_labels: Tensor, reference_labels: Tensor, label_comparison_fn: Comparison) -> Counts:
    """The distinct labels of the queries, `(C,)` or `(C, L)`, and how many references match each, `(C,)` int64.

    Args:
        query_labels: `(Q,)`, or `(Q, L)` where a label has several parts; reference_labels: `(M,)` or `(M, L)`.
        label_comparison_fn: `EQUALITY`, or a function of two label tensors that broadcast.
    """
    if label_comparison_fn is EQUALITY:
        every, ids = distinct(torch.cat([query_labels, reference_labels]))
        present, _ = distinct(ids[: len(query_labels)])
        return every[present], ids[len(query_labels) :].bincount(minlength=len(every))[present]
    unique, _ = distinct(query_labels)
    step = max(BUDGET // max(reference_labels.numel(), 1), 1)
    counts = [
        matching(label_comparison_fn, unique[i : i + step, None], reference_labels[None]).sum(1)
        for i in range(0, len(unique), step)
    ]
    return unique, torch.cat(counts)


def get_lone_query_labels(
    query_labels: Tensor, label_counts: Counts, ref_includes_query: bool, label_comparison_fn: Comparison
) -> tuple[Tensor, Tensor]:
    """The labels that no reference matches, and a `(Q,)` mask of the queries that have another label.

    A query among the references does not count as a match of itself.
    """
    relevant = relevant_per_label(label_counts, ref_includes_query, label_comparison_fn)
    return label_counts[0][relevant <= 0], relevant[ids_among(label_counts[0], query_labels)] > 0


def relevant_per_label(counts: Counts, ref_includes_query: bool, label_comparison_fn: Comparison) -> Tensor:
    """`(C,)`: how many references match each label, less the query itself if it is among them and matches."""
    if not ref_includes_query:
        return counts[1]
    return counts[1] - matching(label_comparison_fn, counts[0][:, None], counts[0][:, None])[:, 0].long()


def ids_among(unique: Tensor, labels: Tensor) -> Tensor:
    """`(Q,)` int64: which of the distinct labels each label is."""
    _, ids = distinct(torch.cat([unique, labels]))
    place = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    place[ids[: len(unique)]] = torch.arange(len(unique), device=ids.device)
    return place[ids[len(unique) :]]


def matching(label_comparison_fn: Comparison, queries: Tensor, references: Tensor) -> Tensor:
    """A matrix of which labels match, from `(Q, 1)` and `(Q or 1, K)` labels; labels of several parts match in all."""
    same = label_comparison_fn(queries, references).bool()  # a number of things in common says so, too
    return same.flatten(2).all(2) if same.ndim > 2 else same


def distinct(labels: Tensor) -> Counts:
    """The distinct labels in order, and which of them each one is."""
    if labels.ndim == 1:  # much faster than a search for distinct rows
        unique, ids = torch.unique(labels, return_inverse=True)
    else:
        unique, ids = torch.unique(labels, dim=0, return_inverse=True)
    return unique, ids


@dataclass(frozen=True, eq=False)
class Answers:
    """The labels of queries and references, and which of those answer which.

    Attributes:
        counts: the distinct query labels, and how many references match each, the query itself included.
        relevant: `(Q,)`: how many references match each query, itself left out.
        lone_labels: the query labels that match none.
    """

    queries: Tensor
    references: Tensor
    comparison: Comparison
    counts: Counts
    relevant: Tensor
    lone_labels: Tensor

    @classmethod
    def of(cls, queries: Tensor, references: Tensor, ref_includes_query: bool, comparison: Comparison) -> "Answers":
        counts = get_label_match_counts(queries, references, comparison)
        ids = ids_among(counts[0], queries)
        relevant = relevant_per_label(counts, ref_includes_query, comparison)
        return cls(queries, references, comparison, counts, relevant[ids], counts[0][relevant <= 0])

    def among(self, rows: slice, indices: Tensor) -> Tensor:
        """Which of these references, `(q, k)`, match the queries of `rows`; an index below 0 is no reference."""
        found = matching(self.comparison, self.queries[rows, None], self.references[indices])
        return found & (indices >= 0)
