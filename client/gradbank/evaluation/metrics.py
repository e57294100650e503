"""Scores of ranked answers, query by query.

A score takes `(Q, k)` bool matches, the nearest reference first, and `(Q,)` R: how many references match the query
at all, at least one. It gives `(Q,)` float64.
"""

from collections.abc import Callable, Sequence
from math import nan
from typing import Any, Protocol

import torch
from torch import Tensor

from gradbank.evaluation.labels import Comparison, distinct, ids_among, matching, relevant_per_label

Score = Callable[[Tensor, Tensor], Tensor]
LabelCounts = tuple[Sequence[Any] | Tensor, Sequence[int] | Tensor]


class Averaging(Protocol):
    """What a score needs to know of its calculator."""

    avg_of_avgs: bool
    return_per_class: bool
    label_comparison_fn: Comparison


def precision_at_1(matches: Tensor, relevant: Tensor) -> Tensor:
    """1 where the nearest reference matches."""
    return matches[:, 0].double()


def r_precision(matches: Tensor, relevant: Tensor) -> Tensor:
    """The part of the R nearest references that match."""
    within = _first(relevant, matches)
    return (matches & within).sum(1).double() / within.sum(1)


def mean_average_precision(matches: Tensor, relevant: Tensor) -> Tensor:
    """The precision at each match among all k, summed, over R."""
    rank = torch.arange(1, matches.shape[1] + 1, device=matches.device)
    precision = matches.cumsum(1) / rank.double()
    return precision.mul_(matches).sum(1) / relevant


def mean_average_precision_at_r(matches: Tensor, relevant: Tensor) -> Tensor:
    """The precision at each match among the R nearest, summed, over R.

    Musgrave et al., "A Metric Learning Reality Check", ECCV 2020.
    """
    return mean_average_precision(matches & _first(relevant, matches), relevant)


def mean_reciprocal_rank(matches: Tensor, relevant: Tensor) -> Tensor:
    """One over the rank of the first match; 0 without a match among all k."""
    first = matches.byte().argmax(1)
    return matches.any(1) / (first + 1).double()


SCORES: dict[str, Score] = {
    each.__name__: each
    for each in (
        precision_at_1,
        r_precision,
        mean_average_precision,
        mean_average_precision_at_r,
        mean_reciprocal_rank,
    )
}


def average(scores: Tensor, labels: Tensor, avg_of_avgs: bool, return_per_class: bool) -> float | list[float]:
    """The mean of `(Q,)` scores, or the mean of each label's mean, or those means in the order of the labels."""
    if not (avg_of_avgs or return_per_class):
        return float(scores.mean())
    unique, ids = distinct(labels)
    sums = torch.zeros(len(unique), dtype=scores.dtype, device=scores.device).index_add_(0, ids, scores)
    means = sums / ids.bincount(minlength=len(unique))
    return means.tolist() if return_per_class else float(means.mean())


def relevant_of(labels: Tensor, label_counts: LabelCounts, ref_includes_query: bool, comparison: Comparison) -> Tensor:
    """`(Q,)`: R of each query, given how many references match each label."""
    unique, counts = (torch.as_tensor(each, device=labels.device) for each in label_counts)
    return relevant_per_label((unique, counts), ref_includes_query, comparison)[ids_among(unique, labels)]


def nothing(labels: int, return_per_class: bool) -> float | list[float]:
    """What stands for a mean where no query has a match among the references."""
    return [nan] * labels if return_per_class else nan


def calculation(name: str) -> Callable[..., float | list[float]]:
    """The score of that name as a calculator's method, for neighbours that are all at hand.

    Arguments are in the order that PML has them: a score that is over R is told before the counts whether a query is
    among the references.
    """
    score = SCORES[name]

    def calculate(
        self: Averaging,
        knn_labels: Tensor,
        query_labels: Tensor,
        not_lone_query_mask: Tensor,
        ref_includes_query: bool = False,
        label_counts: LabelCounts | None = None,
        **kwargs: Any,
    ) -> float | list[float]:
        if label_counts is None:
            raise TypeError(f"calculate_{name} needs label_counts")
        if not bool(not_lone_query_mask.any()):
            return nothing(len(label_counts[0]), self.return_per_class)
        knn_labels, labels = knn_labels[not_lone_query_mask], query_labels[not_lone_query_mask]
        relevant = relevant_of(labels, label_counts, ref_includes_query, self.label_comparison_fn)
        scores = score(matching(self.label_comparison_fn, labels[:, None], knn_labels), relevant)
        return average(scores, labels, self.avg_of_avgs, self.return_per_class)

    def calculate_by_rank(
        self: Averaging,
        knn_labels: Tensor,
        query_labels: Tensor,
        not_lone_query_mask: Tensor,
        label_counts: LabelCounts,
        ref_includes_query: bool = False,
        **kwargs: Any,
    ) -> float | list[float]:
        return calculate(self, knn_labels, query_labels, not_lone_query_mask, ref_includes_query, label_counts)

    made = calculate_by_rank if score in (precision_at_1, mean_reciprocal_rank) else calculate
    made.__doc__ = score.__doc__
    made.__name__ = made.__qualname__ = f"calculate_{name}"  # as which a copy of its calculator looks for it
    return made


def _first(count: Tensor, matches: Tensor) -> Tensor:
    """A mask like `matches` of the first `count` columns of each row."""
    return torch.arange(matches.shape[1], device=matches.device) < count[:, None]
