"""k-means, and where it starts from."""

import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans
from torch import Tensor

from gradbank.evaluation import KMeans


def inertia(x: Tensor, clusters: Tensor) -> float:
    """The squared distances from the clusters' means, summed."""
    return sum(float((x[clusters == c] - x[clusters == c].mean(0)).square().sum()) for c in clusters.unique())


def test_well_apart_clusters_are_found() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0], [9.0, 9.0], [30.0, 30.0]])
    labels = torch.arange(200) % 5
    clusters = KMeans()(centres[labels] + torch.randn(200, 2), 5)
    assert clusters.dtype == torch.int64
    assert len({(label, cluster) for label, cluster in zip(labels.tolist(), clusters.tolist())}) == 5


def test_digits_are_clustered_as_well_as_by_scikit_learn(digits: tuple[Tensor, Tensor]) -> None:
    x, _ = digits
    theirs = SklearnKMeans(10, n_init=1, max_iter=20, random_state=0).fit(x.numpy()).labels_
    assert inertia(x, KMeans(niter=20)(x, 10)) < 1.05 * inertia(x, torch.as_tensor(theirs))


def test_the_seed_decides(digits: tuple[Tensor, Tensor]) -> None:
    x, _ = digits
    first = KMeans(niter=2)(x, 10)
    torch.manual_seed(1)
    assert torch.equal(KMeans(niter=2)(x, 10), first)
    assert not torch.equal(KMeans(niter=2, seed=5)(x, 10), first)


def test_every_row_ends_with_the_nearest_centre(digits: tuple[Tensor, Tensor]) -> None:
    x, _ = digits
    clusters = KMeans(niter=300)(x, 10)
    means = torch.stack([x[clusters == c].mean(0) for c in range(10)])
    assert torch.equal(torch.cdist(x, means).argmin(1), clusters)


@pytest.mark.parametrize("number", [1, 3, 6])
def test_no_cluster_is_empty_while_rows_differ(number: int) -> None:
    x = torch.arange(6.0)[:, None].repeat(4, 1)
    assert KMeans()(x, number).unique().tolist() == list(range(number))


def test_a_cluster_without_rows_takes_the_farthest() -> None:
    class Badly(KMeans):
        def _seeded(self, x: Tensor, number: int) -> Tensor:
            return torch.tensor([[0.0], [500.0], [600.0]])

    x = torch.tensor([[0.0], [1.0], [2.0], [30.0], [40.0]])
    assert Badly()(x, 3).tolist() == [0, 0, 0, 2, 1]


def test_copies_of_one_row_are_one_cluster() -> None:
    assert len(KMeans()(torch.ones(5, 2), 3).unique()) == 1


@pytest.mark.parametrize("number", [0, 4])
def test_clusters_without_rows_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match="1 to 3 clusters of 3 rows"):
        KMeans()(torch.randn(3, 2), number)
