"""What metrics of one's own are made of: the names of `pytorch_metric_learning.utils.accuracy_calculator`.

A metric is a method `calculate_<name>` of a subclass of `AccuracyCalculator`. Here `knn_labels` is `(Q, K)`, the labels
of each query's neighbours, nearest first, and `gt_labels` is `(Q, 1)`; labels of L parts have another dimension. All
give the mean over the queries, the mean of each label's mean (`avg_of_avgs`), or a list of those (`return_per_class`).
"""

from torch import Tensor

from gradbank.evaluation import metrics
from gradbank.evaluation.labels import EQUALITY, Comparison, Counts, distinct, matching


def precision_at_k(
    knn_labels: Tensor,
    gt_labels: Tensor,
    k: int,
    avg_of_avgs: bool = False,
    return_per_class: bool = False,
    label_comparison_fn: Comparison = EQUALITY,
) -> float | list[float]:
    """The part of the k nearest references that match; K is at least k.

    Raises:
        TypeError: a comparison in the place of `return_per_class`, as older versions of PML had it.
    """
    if callable(return_per_class):
        raise TypeError("precision_at_k takes return_per_class before label_comparison_fn, as PML 2.9 does")
    matches = matching(label_comparison_fn, gt_labels, knn_labels[:, :k])
    return maybe_get_avg_of_avgs(matches.sum(1).double() / k, gt_labels, avg_of_avgs, return_per_class)


def r_precision(
    knn_labels: Tensor,
    gt_labels: Tensor,
    ref_includes_query: bool,
    label_counts: Counts,
    avg_of_avgs: bool = False,
    return_per_class: bool = False,
    label_comparison_fn: Comparison = EQUALITY,
) -> float | list[float]:
    """The part of the R nearest references that match, R being how many do at all."""
    matches = matching(label_comparison_fn, gt_labels, knn_labels)
    relevant = metrics.relevant_of(gt_labels[:, 0], label_counts, ref_includes_query, label_comparison_fn)
    return maybe_get_avg_of_avgs(metrics.r_precision(matches, relevant), gt_labels, avg_of_avgs, return_per_class)


def mean_average_precision(
    knn_labels: Tensor,
    gt_labels: Tensor,
    ref_includes_query: bool,
    label_counts: Counts,
    avg_of_avgs: bool = False,
    return_per_class: bool = False,
    label_comparison_fn: Comparison = EQUALITY,
    at_r: bool = False,
) -> float | list[float]:
    """The precision at each match among all K, or among the R nearest (`at_r`), summed, over R."""
    matches = matching(label_comparison_fn, gt_labels, knn_labels)
    relevant = metrics.relevant_of(gt_labels[:, 0], label_counts, ref_includes_query, label_comparison_fn)
    score = metrics.mean_average_precision_at_r if at_r else metrics.mean_average_precision
    return maybe_get_avg_of_avgs(score(matches, relevant), gt_labels, avg_of_avgs, return_per_class)


def mean_reciprocal_rank(
    knn_labels: Tensor,
    gt_labels: Tensor,
    avg_of_avgs: bool = False,
    return_per_class: bool = False,
    label_comparison_fn: Comparison = EQUALITY,
) -> float | list[float]:
    """One over the rank of the first match; 0 without one among all K."""
    matches = matching(label_comparison_fn, gt_labels, knn_labels)
    scores = metrics.mean_reciprocal_rank(matches, matches.sum(1))
    return maybe_get_avg_of_avgs(scores, gt_labels, avg_of_avgs, return_per_class)


def maybe_get_avg_of_avgs(
    accuracy_per_sample: Tensor, sample_labels: Tensor, avg_of_avgs: bool, return_per_class: bool
) -> float | list[float]:
    """The mean of `(Q,)` scores, in one of the three ways; labels may be `(Q,)` here."""
    labels = sample_labels if sample_labels.ndim == 1 else sample_labels[:, 0]
    return metrics.average(accuracy_per_sample, labels, avg_of_avgs, return_per_class)


def get_unique_labels(labels: Tensor) -> Tensor:
    """The distinct labels, in order."""
    return distinct(labels)[0]


def try_getting_not_lone_labels(
    knn_labels: Tensor, query_labels: Tensor, not_lone_query_mask: Tensor
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Those of the queries that have a match among the references; None where there is no such query."""
    if not bool(not_lone_query_mask.any()):
        return None, None
    return knn_labels[not_lone_query_mask], query_labels[not_lone_query_mask]


def nan_accuracy(unique_labels: Tensor, return_per_class: bool) -> float | list[float]:
    """What stands for a metric where no query has a match."""
    return metrics.nothing(len(unique_labels), return_per_class)
