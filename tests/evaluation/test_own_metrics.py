"""Metrics of a user's own in an AccuracyCalculator, and the labels that they and comparisons get."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import pytorch_metric_learning.utils.accuracy_calculator as pml
import torch
from torch import Tensor

from gradbank import evaluation
from gradbank.evaluation import AccuracyCalculator, ExactKNN, precision_at_k

RETRIEVAL = ("mean_average_precision", "mean_average_precision_at_r", "mean_reciprocal_rank", "r_precision")


def calculator(kind: type[AccuracyCalculator] = AccuracyCalculator, **arguments: Any) -> AccuracyCalculator:
    return kind(**{"exclude": ("NMI", "AMI"), "knn_func": ExactKNN(), "device": "cpu", **arguments})


def task() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(60, 3), torch.randint(4, (60,))


class Counting(AccuracyCalculator):
    """With a metric that needs all neighbours at once."""

    def calculate_neighbours(self, knn_labels: Tensor, **kwargs: Any) -> int:
        return knn_labels.numel()

    def requires_knn(self) -> list[str]:
        return [*super().requires_knn(), "neighbours"]


@pytest.mark.parametrize("k", [None, 7])
def test_a_metric_of_ones_own_leaves_the_others_as_they_are(k: int | None) -> None:
    """Where an index answers -1, as approximate ones do, for neighbours that it did not find."""

    def half(query: Tensor, k: int, reference: Tensor, own: bool) -> tuple[Tensor, Tensor]:
        far, rows = ExactKNN()(query, k, reference, own)
        rows[:, k // 2 :] = -1
        return far, rows

    wanted = calculator(k=k, knn_func=half).get_accuracy(*task())
    found = calculator(Counting, k=k, knn_func=half).get_accuracy(*task())
    assert found.pop("neighbours") == 60 * (k or 59)
    assert found == wanted


def test_metrics_may_be_made_for_one_calculator() -> None:
    class AtRanks(AccuracyCalculator):
        def __init__(self, ranks: tuple[int, ...], **kwargs: Any) -> None:
            self.ranks = ranks
            for rank in ranks:
                setattr(self, f"calculate_precision_at_{rank}", partial(self.at, rank))
            super().__init__(**kwargs)

        def at(self, rank: int, knn_labels: Tensor, query_labels: Tensor, **kwargs: Any) -> Any:
            return precision_at_k(knn_labels, query_labels[:, None], rank)

        def requires_knn(self) -> list[str]:
            return [*super().requires_knn(), *(f"precision_at_{rank}" for rank in self.ranks)]

    made = AtRanks((1, 2, 5), knn_func=ExactKNN(), device="cpu", exclude=("NMI", "AMI"))
    made.original_function_dict["queries"] = lambda query, **_: len(query)
    found = made.get_accuracy(*task())
    plain = calculator().get_accuracy(*task())
    assert {name: found[name] for name in RETRIEVAL} == {name: plain[name] for name in RETRIEVAL}
    assert found["precision_at_1"] == pytest.approx(plain["precision_at_1"])
    assert 0 < found["precision_at_5"] != found["precision_at_2"] > 0
    assert found["queries"] == 60


@pytest.mark.parametrize("largest", [2**24, 2**24 + 1])
def test_labels_are_float32_unless_that_would_merge_them(largest: int) -> None:
    seen = []

    def same(a: Tensor, b: Tensor) -> Tensor:
        seen.extend([a.dtype, b.dtype])
        return a == b

    points, labels = task()
    calculator(label_comparison_fn=same).get_accuracy(points, labels + largest - 3)
    assert set(seen) == {torch.float32 if largest == 2**24 else torch.float64}


@pytest.mark.parametrize("start", [2**60, -(2**63), 2**63 - 9], ids=["large", "lowest", "highest"])
def test_labels_of_any_size_stay_apart(start: int) -> None:
    points, labels = task()
    whole = calculator(return_per_class=True)
    assert whole.get_accuracy(points, labels + start) == whole.get_accuracy(points, labels)
    parts, others = torch.stack([labels, labels % 2], 1), (points + 1, torch.stack([labels, labels // 2], 1))
    wanted = calculator().get_accuracy(points, parts, *others)
    assert calculator().get_accuracy(points, parts + start, others[0], others[1] + start) == wanted


def test_names_are_refused_as_labels() -> None:
    points, labels = task()
    for names in ([str(each) for each in labels.tolist()], labels.numpy().astype(str)):
        with pytest.raises(ValueError, match=r"labels must be numbers, .*return_inverse"):
            calculator().get_accuracy(points, names)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int8", "bool"])
def test_labels_may_be_of_any_whole_dtype(dtype: str) -> None:
    points, labels = task()
    labels = labels % 2 if dtype == "bool" else labels
    whole = calculator(return_per_class=True)
    assert whole.get_accuracy(points, labels.numpy().astype(dtype)) == whole.get_accuracy(points, labels)


def test_labels_beyond_int64_stay_apart() -> None:
    points, labels = task()
    large = labels.numpy().astype("uint64") + np.uint64(2**64 - 9)
    assert calculator().get_accuracy(points, large) == calculator().get_accuracy(points, labels)


@pytest.mark.parametrize("avg_of_avgs", [False, True])
@pytest.mark.parametrize("return_per_class", [False, True])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_what_metrics_are_made_of_is_that_of_pml(
    avg_of_avgs: bool, return_per_class: bool, own: bool, parts: int
) -> None:
    torch.manual_seed(0)
    shape = () if parts == 1 else (parts,)
    known, labels = torch.randint(4, (50, *shape)), torch.randint(3, (20, *shape))
    counts = evaluation.get_label_match_counts(labels, known, evaluation.EQUALITY)
    labels = labels[evaluation.get_lone_query_labels(labels, counts, own, evaluation.EQUALITY)[1]]
    knn_labels, column = known[torch.rand(len(labels), 50).argsort(1)[:, :30]], labels[:, None]
    how = {"avg_of_avgs": avg_of_avgs, "return_per_class": return_per_class}
    compared = {**how, "label_comparison_fn": torch.eq if parts == 1 else lambda a, b: (a == b).all(-1)}
    mask = torch.arange(len(labels)) % 3 > 0
    for name, given in (
        ("precision_at_k", {"k": 3, **compared}),
        ("mean_reciprocal_rank", compared),
        ("r_precision", {"ref_includes_query": own, "label_counts": counts, **compared}),
        ("mean_average_precision", {"ref_includes_query": own, "label_counts": counts, **compared}),
        ("mean_average_precision", {"ref_includes_query": own, "label_counts": counts, "at_r": True, **compared}),
    ):
        found = getattr(evaluation, name)(knn_labels, column, **given)
        assert found == pytest.approx(getattr(pml, name)(knn_labels, column, **given)), name
    scores = torch.rand(len(labels), dtype=torch.float64)
    found = evaluation.maybe_get_avg_of_avgs(scores, column, **how)
    assert found == pytest.approx(pml.maybe_get_avg_of_avgs(scores, column, **how))
    assert torch.equal(evaluation.get_unique_labels(labels), pml.get_unique_labels(labels))
    assert evaluation.try_getting_not_lone_labels(knn_labels, labels, mask & False) == (None, None)
    for here, there in zip(
        evaluation.try_getting_not_lone_labels(knn_labels, labels, mask),
        pml.try_getting_not_lone_labels(knn_labels, labels, mask),
    ):
        assert torch.equal(here, there)  # type: ignore[arg-type]  # there are some
    assert str(evaluation.nan_accuracy(labels, return_per_class)) == str(pml.nan_accuracy(labels, return_per_class))


def test_metrics_may_be_asked_for_in_a_set() -> None:
    found = calculator().get_accuracy(*task(), include={"precision_at_1"})  # type: ignore[arg-type]  # as PML takes it
    assert set(found) == {"precision_at_1"}


def test_arguments_of_metrics_come_in_the_order_of_pml() -> None:
    _, labels = task()
    calculators = (
        calculator(return_per_class=True),
        pml.AccuracyCalculator(exclude=("NMI", "AMI"), return_per_class=True, device=torch.device("cpu")),
    )
    knn_labels, counts = (
        labels[torch.rand(60, 60).argsort(1)],
        evaluation.get_label_match_counts(labels, labels, torch.eq),
    )
    mask = torch.ones(60, dtype=torch.bool)
    for name in RETRIEVAL:
        given: tuple[Any, ...] = (counts,) if name == "mean_reciprocal_rank" else (True, counts)
        found, wanted = (getattr(each, f"calculate_{name}")(knn_labels, labels, mask, *given) for each in calculators)
        assert found == pytest.approx(wanted), name


def test_a_class_that_computes_the_metrics_in_its_own_way_gets_what_they_need() -> None:
    seen: dict[str, Any] = {}

    class Keeping(AccuracyCalculator):
        def _get_accuracy(self, function_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            seen.update(kwargs, names=list(function_dict))
            return super()._get_accuracy(function_dict, **kwargs)

    query, labels = task()
    wanted = calculator(k=5).get_accuracy(query, labels)
    assert calculator(Keeping, k=5).get_accuracy(query, labels) == pytest.approx(wanted)
    assert sorted(seen["names"]) == sorted(wanted)
    assert seen["knn_labels"].shape == seen["knn_distances"].shape == (60, 5)
    assert seen["not_lone_query_mask"].shape == (60,)


def test_an_order_of_older_versions_is_refused() -> None:
    _, labels = task()
    with pytest.raises(TypeError, match="takes return_per_class before label_comparison_fn"):
        precision_at_k(labels[:, None], labels[:, None], 1, False, torch.eq)  # type: ignore[arg-type]
