"""MatchFinder: pairs within a threshold."""

import numpy as np
import pytest
import pytorch_metric_learning.distances as pml_distances
import torch
from pytorch_metric_learning.utils.inference import MatchFinder as PMLFinder

from gradbank import distances
from gradbank.evaluation import MatchFinder, matches


@pytest.mark.parametrize(("name", "threshold"), [("CosineSimilarity", 0.3), ("LpDistance", 1.1)])
@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("budget", [1 << 21, 30])
def test_pairs_are_those_of_pml(
    monkeypatch: pytest.MonkeyPatch, name: str, threshold: float, references: bool, budget: int
) -> None:
    monkeypatch.setattr(matches, "BUDGET", budget)
    torch.manual_seed(0)
    given = (torch.randn(20, 4), torch.randn(9, 4)) if references else (torch.randn(20, 4),)
    ours = MatchFinder(getattr(distances, name)(), threshold)
    theirs = PMLFinder(getattr(pml_distances, name)(), threshold)
    mask = ours.get_matching_pairs(*given)
    assert isinstance(mask, np.ndarray)
    assert mask.dtype == np.bool_
    assert 0 < mask.sum() < mask.size
    np.testing.assert_array_equal(mask, theirs.get_matching_pairs(*given))
    listed = ours.get_matching_pairs(*given, return_tuples=True)
    assert listed == theirs.get_matching_pairs(*given, return_tuples=True)
    assert len(listed) == mask.sum()


def test_a_threshold_of_the_call_replaces_that_of_the_finder() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    finder = MatchFinder(distances.CosineSimilarity(), threshold=0.9)
    assert finder.get_matching_pairs(x, threshold=0.7, return_tuples=True) != finder.get_matching_pairs(
        x, return_tuples=True
    )
    assert finder.get_matching_pairs(x, threshold=0).all()  # 0 is a threshold, not the lack of one
    assert finder.is_match(x[:1], x[1:2], threshold=0) is True
    assert finder.is_match(x[:1], x[1:2]) is False


@pytest.mark.parametrize(("name", "threshold"), [("CosineSimilarity", 0.3), ("LpDistance", 1.1)])
def test_a_pair_matches_in_place_as_it_does_in_the_matrix(name: str, threshold: float) -> None:
    """PML normalises in one and not in the other."""
    torch.manual_seed(0)
    x, y = 3 * torch.randn(20, 4), torch.randn(20, 4)
    finder = MatchFinder(getattr(distances, name)(), threshold)
    mask = finder.get_matching_pairs(x, y)
    found = finder.is_match(x, y)
    assert isinstance(mask, np.ndarray)
    assert isinstance(found, np.ndarray)
    assert 0 < found.sum() < 20
    np.testing.assert_array_equal(found, mask.diagonal())


def test_no_queries_match_nothing() -> None:
    finder = MatchFinder(distances.CosineSimilarity(), 0.5)
    mask = finder.get_matching_pairs(torch.zeros(0, 2), torch.ones(3, 2))
    assert isinstance(mask, np.ndarray)
    assert mask.shape == (0, 3)
    assert finder.get_matching_pairs(torch.zeros(0, 2), torch.ones(3, 2), return_tuples=True) == []


def test_matching_takes_no_gradient_and_a_threshold() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    finder = MatchFinder(distances.CosineSimilarity())
    assert isinstance(finder.get_matching_pairs(x, threshold=0.5), np.ndarray)
    for call in (lambda: finder.get_matching_pairs(x), lambda: finder.is_match(x, x)):
        with pytest.raises(ValueError, match="there is no threshold"):
            call()


class Taxi(distances.Distance):
    """A user's own, that knows matrices only."""

    def compute_mat(self, query_emb: torch.Tensor, ref_emb: torch.Tensor) -> torch.Tensor:
        return (query_emb[:, None] - ref_emb).abs().sum(2)


@pytest.mark.parametrize("distance", [distances.CosineSimilarity(), distances.SNRDistance(), Taxi()], ids=str)
def test_one_row_is_compared_with_all_of_the_others(distance: distances.Distance) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 4), torch.randn(40, 4)
    finder = MatchFinder(distance, threshold=float(distance(x, y).median()))
    whole = finder.get_matching_pairs(x, y)
    np.testing.assert_array_equal(finder.is_match(x, y), np.diagonal(whole))
    np.testing.assert_array_equal(finder.is_match(x[3:4], y), whole[3])
    np.testing.assert_array_equal(finder.is_match(x, y[3]), whole[:, 3])
    assert finder.is_match(x[3], y[4]) is bool(whole[3, 4])
    with pytest.raises(ValueError, match="as many rows, or one of them one row; got 35 and 40"):
        finder.is_match(x[:35], y)


def test_a_distance_of_pml_is_named() -> None:
    with pytest.raises(TypeError, match=r"MatchFinder: distance must be a Distance, got pytorch_.*from_pml"):
        MatchFinder(pml_distances.CosineSimilarity(), threshold=0.5)
