"""Which references match which queries."""

from typing import Any

import pytest
import torch
from pytorch_metric_learning.utils import accuracy_calculator as pml
from torch import Tensor

from gradbank.evaluation import EQUALITY, AccuracyCalculator, get_label_match_counts, get_lone_query_labels, labels


def near(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs() < 2


def far(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs() > 99


def other_part(a: Tensor, b: Tensor) -> Tensor:
    return (a[..., 0] == b[..., 0]) & (a[..., 1] != b[..., 1])


PLAIN = torch.tensor([0, 0, 1, 2, 3, 4, 100, 7, 9]), torch.tensor([0, 0, 1, 50, 3, 3, 8])
PAIRED = torch.tensor([[1, 3], [0, 3], [0, 3], [1, 2], [4, 5]]), torch.tensor([[0, 3], [1, 2], [1, 3], [0, 1]])


CASES = [(PLAIN, EQUALITY), (PLAIN, near), (PLAIN, far), (PAIRED, EQUALITY), (PAIRED, other_part)]
BY_PML = [(*case, own) for case in CASES for own in (False, True)]
del BY_PML[7]  # equal labels of several parts, the queries among the references: PML compares the parts


@pytest.mark.parametrize(("given", "comparison", "own"), BY_PML)
def test_counts_and_lone_labels_are_those_of_pml(
    monkeypatch: pytest.MonkeyPatch, given: tuple[Tensor, Tensor], comparison: labels.Comparison, own: bool
) -> None:
    monkeypatch.setattr(labels, "BUDGET", 10)
    queries, references = given
    references = torch.cat([queries, references]) if own else references
    found = get_label_match_counts(queries, references, comparison)
    wanted = pml.get_label_match_counts(queries, references, comparison)
    torch.testing.assert_close(found, wanted)
    found_lone, found_mask = get_lone_query_labels(queries, found, own, comparison)
    wanted_lone, wanted_mask = pml.get_lone_query_labels(queries, wanted, own, comparison)
    assert found_lone.tolist() == wanted_lone.tolist()
    assert found_mask.tolist() == wanted_mask.tolist()


def test_a_label_of_several_parts_is_alone_as_a_whole() -> None:
    queries = torch.tensor([[1, 3], [0, 3], [0, 3], [1, 2]])
    counts = get_label_match_counts(queries, queries, EQUALITY)
    lone, has_other = get_lone_query_labels(queries, counts, True, EQUALITY)
    assert lone.tolist() == [[1, 2], [1, 3]]
    assert has_other.tolist() == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_numbers_beyond_float32_are_told_apart_in_either_dtype(dtype: torch.dtype) -> None:
    ids = torch.tensor([20_000_000, 20_000_001] * 2).to(dtype)
    told = AccuracyCalculator(include=("r_precision",), return_per_class=True).get_accuracy(torch.eye(4), ids)
    assert told["r_precision"] == [0.5, 0.0]
    seconds = torch.tensor([1_700_000_000, 1_700_000_050, 1_700_000_300, 1_700_000_301]).to(dtype)
    near = AccuracyCalculator(include=("precision_at_1",), label_comparison_fn=lambda a, b: (a - b).abs() < 10)
    assert near.get_accuracy(torch.tensor([[0.0], [1.0], [2.1], [3.3]]), seconds)["precision_at_1"] == 0.5


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.bool])
def test_a_comparison_may_count_what_labels_have_in_common(kind: torch.dtype) -> None:
    tags = torch.tensor([[1.0, 1, 0]] * 3 + [[0, 0, 1]])
    shared = AccuracyCalculator(include=("precision_at_1",), label_comparison_fn=lambda a, b: (a * b).sum(-1).to(kind))
    points = torch.tensor([[0.0], [0.1], [0.2], [9.0]])
    assert shared.get_accuracy(points, tags)["precision_at_1"] == 1


def test_what_a_metric_is_called_may_be_changed() -> None:
    class Prefixed(AccuracyCalculator):
        def _get_accuracy(self, functions: Any, **given: Any) -> dict[str, Any]:
            return {f"val/{name}": value for name, value in super()._get_accuracy(functions, **given).items()}

    told = Prefixed(include=("precision_at_1",)).get_accuracy(torch.randn(8, 3), torch.arange(8) // 2)
    assert list(told) == ["val/precision_at_1"]


def test_labels_are_compared_as_the_narrower_of_two_floats() -> None:
    wide = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    told = AccuracyCalculator(include=("precision_at_1",)).get_accuracy(torch.eye(3), wide, torch.eye(3), wide.float())
    assert told["precision_at_1"] == 1
