"""Which references match which queries."""

import pytest
import torch
from pytorch_metric_learning.utils import accuracy_calculator as pml
from torch import Tensor

from gradbank.evaluation import EQUALITY, get_label_match_counts, get_lone_query_labels, labels


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
