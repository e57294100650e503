"""Scores of neighbours that were found elsewhere."""

import pytest
import torch
from torch import Tensor

from gradbank.evaluation import AccuracyCalculator, ExactKNN, precision_at_k

LABELS = torch.tensor([1, 1, 2, 3, 4])
KNN_LABELS = torch.tensor([[0, 1, 1, 2, 2], [1, 0, 1, 1, 3], [4, 4, 4, 4, 2], [3, 1, 3, 1, 3], [0, 0, 4, 2, 2]])
COUNTS = [1, 2, 3, 4], [3, 5, 4, 5]

# Worked out by hand, query by query.
APART = {
    "precision_at_1": [0, 1, 0, 1, 0],
    "r_precision": [2 / 3, 2 / 3, 1 / 5, 2 / 4, 1 / 5],
    "mean_average_precision_at_r": [(1 / 2 + 2 / 3) / 3, (1 + 2 / 3) / 3, 1 / 25, (1 + 2 / 3) / 4, 1 / 15],
    "mean_average_precision": [(1 / 2 + 2 / 3) / 3, (1 + 2 / 3 + 3 / 4) / 3, 1 / 25, (1 + 2 / 3 + 3 / 5) / 4, 1 / 15],
    "mean_reciprocal_rank": [1 / 2, 1, 1 / 5, 1, 1 / 3],
}
WITHIN = {
    "precision_at_1": [1, 0, 0, 0, 0],
    "r_precision": [1, 1 / 2, 1 / 4, 1 / 3, 1 / 4],
    "mean_average_precision_at_r": [1, 1 / 4, 1 / 16, 1 / 6, 1 / 8],
    "mean_average_precision": [1, (1 / 2 + 2 / 3) / 2, 1 / 16, (1 / 2 + 2 / 4) / 3, 1 / 8],
    "mean_reciprocal_rank": [1, 1 / 2, 1 / 4, 1 / 2, 1 / 2],
}


@pytest.mark.parametrize("averaging", ["queries", "avg_of_avgs", "return_per_class"])
@pytest.mark.parametrize("own", [False, True])
def test_a_metric_scores_the_neighbours_that_it_is_given(averaging: str, own: bool) -> None:
    arguments = {} if averaging == "queries" else {averaging: True}
    calculator = AccuracyCalculator(exclude=("NMI", "AMI"), knn_func=ExactKNN(), device="cpu", **arguments)
    # Of each row the first two neighbours are of one query's own label at most: drop one for the query itself.
    knn_labels = KNN_LABELS[:, 1:] if own else KNN_LABELS
    expected = WITHIN if own else APART
    for name, calculate in calculator.get_function_dict().items():
        found = calculate(
            query_labels=LABELS,
            label_counts=COUNTS,
            knn_labels=knn_labels,
            not_lone_query_mask=torch.ones(5, dtype=torch.bool),
            ref_includes_query=own,
        )
        each = torch.tensor(expected[name], dtype=torch.float64)
        by_class = [float(each[label == LABELS].mean()) for label in (1, 2, 3, 4)]
        wanted = {"queries": float(each.mean()), "avg_of_avgs": sum(by_class) / 4, "return_per_class": by_class}
        assert found == pytest.approx(wanted[averaging], rel=1e-14), name


def test_precision_at_k_is_the_part_of_k_that_match() -> None:
    wanted = [1 / 2, 1 / 2, 0, 1 / 2, 0]
    assert precision_at_k(KNN_LABELS, LABELS[:, None], 2) == pytest.approx(sum(wanted) / 5)
    assert precision_at_k(KNN_LABELS, LABELS[:, None], 2, return_per_class=True) == [0.5, 0, 0.5, 0]
    assert precision_at_k(KNN_LABELS, LABELS[:, None], 2, avg_of_avgs=True) == 0.25

    def above(a: Tensor, b: Tensor) -> Tensor:
        return b > a

    assert precision_at_k(KNN_LABELS, LABELS[:, None], 1, label_comparison_fn=above) == 1 / 5


def test_metrics_say_what_they_are() -> None:
    for name in AccuracyCalculator().get_function_dict():
        assert (getattr(AccuracyCalculator, f"calculate_{name}").__doc__ or "").strip()
