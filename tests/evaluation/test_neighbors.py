"""Nearest neighbours: which, in which order, and in how much memory."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import torch
from pytorch_metric_learning.utils.inference import CustomKNN as PMLKNN
from torch import Tensor

from gradbank import distances
from gradbank.evaluation import KNN, CustomKNN, ExactKNN, MatchFinder, neighbors


def by_loops(query: Tensor, k: int, reference: Tensor, ref_includes_query: bool) -> list[list[int]]:
    """The rows by squared Euclidean distance, the lower first, each query taken out by its own row."""
    listed = []
    for i, q in enumerate(query.double()):
        apart = ((reference.double() - q) ** 2).sum(1).float().tolist()
        order = sorted((d, j) for j, d in enumerate(apart) if not (ref_includes_query and i == j))
        listed.append([j for _, j in order[:k]])
    return listed


def grid(rows: int, seed: int) -> Tensor:
    """Points of a small grid, of which many are equally far from each other and some are copies."""
    return torch.randint(3, (rows, 3), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("k", [1, 4, 29, 39])
@pytest.mark.parametrize("budget", [1 << 21, 600, 1])
def test_neighbours_are_the_nearest_and_of_equals_the_first(
    monkeypatch: pytest.MonkeyPatch, own: bool, k: int, budget: int
) -> None:
    monkeypatch.setattr(neighbors, "BUDGET", budget)
    reference = grid(40, seed=1)
    query = reference[:25] if own else grid(25, seed=2)
    squared = CustomKNN(distances.LpDistance(normalize_embeddings=False, power=2))
    for knn in (ExactKNN(), squared):
        far, rows = knn(query, k, reference, own)
        assert rows.dtype == torch.int64
        assert bool((far.diff(dim=1) >= 0).all())
        if knn is not squared:  # cdist's distances of copies are not all equal
            assert rows.tolist() == by_loops(query, k, reference, own)
        expected = (query[:, None] - reference[rows]).square().sum(2)
        torch.testing.assert_close(far, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["CosineSimilarity", "LpDistance", "DotProductSimilarity"])
@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("own", [False, True])
def test_any_distance_finds_what_pml_finds(name: str, batch_size: int | None, own: bool) -> None:
    torch.manual_seed(0)
    reference = torch.randn(50, 5, dtype=torch.float64)
    query = reference[:20] if own else torch.randn(20, 5, dtype=torch.float64)
    ours = CustomKNN(getattr(distances, name)(), batch_size)(query, 6, reference, own)
    theirs = PMLKNN(getattr(pml_distances, name)())(query, 6, reference, own)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_a_query_is_told_from_its_copies_by_its_row() -> None:
    """As in PML: where all distances are equal a query is rarely the first of its own neighbours."""
    same = torch.ones(6, 2)
    for knn in (ExactKNN(), CustomKNN(distances.LpDistance())):
        _, rows = knn(same, 3, same, True)
        assert rows.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]


def test_copies_tie_far_from_the_origin_too() -> None:
    """In float32 the squares of such rows leave nothing of their distances."""
    near = torch.tensor([[1000.0, 0.0], [1000.001, 0.0], [1000.002, 0.0]])
    reference = near.repeat(40, 1)
    _, rows = ExactKNN()(near, 41, reference)
    for i in range(3):
        assert rows[i, :40].tolist() == list(range(i, 120, 3))
        assert int(rows[i, 40]) == (0 if i == 1 else 1)


def test_no_block_is_larger_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def measured(mat: Tensor, k: int) -> tuple[Tensor, Tensor]:
        sizes.append(mat.numel())
        return nearest(mat, k)

    nearest = neighbors.nearest
    monkeypatch.setattr(neighbors, "BUDGET", 4000)
    monkeypatch.setattr(neighbors, "nearest", measured)
    points = torch.randn(500, 4)
    chunks = list(ExactKNN().chunks(points, 3, points, True))
    assert len(chunks) == 32
    assert sum(rows.stop - rows.start for rows, _, _ in chunks) == 500
    assert max(sizes) <= 4000
    assert sum(sizes) == 500 * 500


def test_a_row_of_nan_is_nobodys_neighbour() -> None:
    points = torch.tensor([[0.0], [torch.nan], [3.0], [1.0]])
    _, rows = ExactKNN()(points[[0, 2]], 3, points)
    assert rows.tolist() == [[0, 3, 2], [2, 3, 0]]


def test_stored_references_are_searched_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    points, query = torch.randn(30, 4), torch.randn(5, 4)
    knn = ExactKNN()
    knn.train(points[:10])
    knn.add(points[10:])
    found = knn(query, 3)
    torch.testing.assert_close(found, knn(query, 3, points), atol=0, rtol=0)
    knn.save(tmp_path / "rows")
    other = ExactKNN()
    other.load(tmp_path / "rows")
    torch.testing.assert_close(other(query, 3), found, atol=0, rtol=0)
    other.train(points[:5])
    assert len(other.reference if other.reference is not None else []) == 5
    other.reset()
    with pytest.raises(ValueError, match="no references: pass reference="):
        other(query, 3)
    with pytest.raises(ValueError, match="no references to save"):
        other.save(tmp_path / "none")


def test_no_queries_have_no_neighbours() -> None:
    far, rows = ExactKNN()(torch.randn(0, 3), 2, torch.randn(4, 3))
    assert far.shape == rows.shape == (0, 2)


@pytest.mark.parametrize(("k", "own", "message"), [(5, False, "1 to 4"), (4, True, "1 to 3.*besides"), (0, False, "")])
def test_more_neighbours_than_there_are_is_refused(k: int, own: bool, message: str) -> None:
    points = torch.randn(4, 2)
    for knn in (ExactKNN(), CustomKNN(distances.LpDistance())):
        with pytest.raises(ValueError, match=f"k must be {message}"):
            knn(points, k, points, own)


def test_references_are_given_or_stored() -> None:
    points = torch.randn(4, 2)
    for knn in (ExactKNN(), CustomKNN(distances.LpDistance())):
        with pytest.raises(ValueError, match="there are no references: pass reference="):
            knn(points, 1)
        knn.train(points)
        assert knn(points, 1)[1].squeeze(1).tolist() == [0, 1, 2, 3]


def test_a_search_of_ones_own_writes_chunks() -> None:
    with pytest.raises(NotImplementedError, match="KNN must define chunks"):
        KNN()(torch.randn(4, 2), 1)


def test_a_batched_distance_searches_by_the_one_within() -> None:
    reference = grid(40, seed=1)
    within = distances.LpDistance(normalize_embeddings=False)
    found = CustomKNN(distances.BatchedDistance(within, batch_size=4))(reference, 5, reference, True)
    wanted = CustomKNN(within)(reference, 5, reference, True)
    assert torch.equal(found[1], wanted[1])
    torch.testing.assert_close(found[0], wanted[0])


@pytest.mark.parametrize("seed", range(20))
def test_copies_of_a_row_tie_whatever_their_dimension(seed: int) -> None:
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed))
    far, rows = ExactKNN()(row, 9, row.repeat(9, 1))
    assert rows.tolist() == [list(range(9))]
    assert not bool(far.any())


def test_a_search_is_in_full_precision_under_autocast() -> None:
    torch.manual_seed(0)
    points, distance = torch.randn(60, 8), distances.CosineSimilarity()
    wanted, matches = CustomKNN(distance)(points, 3, points), MatchFinder(distance, 0.5).get_matching_pairs(points)
    with torch.autocast("cpu", torch.bfloat16):
        found, again = CustomKNN(distance)(points, 3, points), MatchFinder(distance, 0.5).get_matching_pairs(points)
    assert found[0].dtype == torch.float32
    assert all(map(torch.equal, found, wanted))
    assert (again == matches).all()


def test_references_may_be_of_another_precision() -> None:
    points, knn = torch.randn(6, 3), CustomKNN(distances.CosineSimilarity())
    knn.train(points.half())
    assert knn(points, 1)[1].squeeze(1).tolist() == list(range(6))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((distances.LpDistance,), TypeError, "must be a distance, as in LpDistance"),
        ((distances.LpDistance(), -1), ValueError, "batch_size must be at least 1"),
    ],
)
def test_what_cannot_search_is_refused(arguments: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        CustomKNN(*arguments)


@pytest.mark.parametrize(("offset", "spread", "dimension"), [(30, 1e-5, 512), (1000, 1e-3, 2048)])
def test_rows_that_lie_close_together_and_far_away_are_told_apart(offset: int, spread: float, dimension: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(100, dimension) * spread + offset
    near = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(
        torch.inf
    )
    assert torch.equal(ExactKNN()(rows, 1, rows, True)[1].squeeze(1), near.argmin(1))
