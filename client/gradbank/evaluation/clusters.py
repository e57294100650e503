"""Clusters of embeddings, and how to compare them with labels."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gradbank.evaluation.labels import distinct
from gradbank.evaluation.neighbors import search, squared_euclidean


class KMeans:
    """k-means with torch: k-means++ seeding, then Lloyd's iterations; the same seed gives the same clusters.

    A cluster that loses its last row takes the row farthest from its centre.

    Args:
        niter: iterations at most; it stops sooner when no row changes its cluster.
        seed: of the choice of the first centres.

    Arthur et al., "k-means++: The Advantages of Careful Seeding", SODA 2007.
    """

    def __init__(self, niter: int = 25, seed: int = 1234) -> None:
        self.niter = niter
        self.seed = seed

    def __call__(self, x: Tensor, nmb_clusters: int) -> Tensor:
        """`(N,)` int64: the cluster of each of `(N, D)` embeddings.

        Raises:
            ValueError: fewer rows than clusters, or no cluster.
        """
        if not 1 <= nmb_clusters <= len(x):
            raise ValueError(f"there must be 1 to {len(x)} clusters of {len(x)} rows, got {nmb_clusters}")
        x = x.detach().float()
        centres = self._seeded(x, nmb_clusters)
        clusters = torch.full((len(x),), -1, device=x.device)
        for _ in range(self.niter + 1):
            last, (clusters, distances) = clusters, _nearest(x, centres)
            if torch.equal(clusters, last):
                break
            centres = _centres(x, clusters, distances, nmb_clusters)
        return clusters

    def _seeded(self, x: Tensor, number: int) -> Tensor:
        """Rows to start from, each chosen with a chance in proportion to its distance from those before, squared."""
        generator = torch.Generator().manual_seed(self.seed)
        chance = torch.rand(number, generator=generator, dtype=torch.float64).to(x.device)
        chosen = torch.zeros(number, dtype=torch.int64, device=x.device)
        nearest = torch.ones(len(x), dtype=torch.float64, device=x.device)
        for i in range(number):
            # Searched for among the running sums; where every distance is 0, rows are copies and any will do.
            sums = nearest.cumsum(0)
            chosen[i] = torch.searchsorted(sums, chance[i] * sums[-1], right=True).clamp(max=len(x) - 1)
            distance = (x - x[chosen[i]]).square().sum(1).double()
            nearest = distance if i == 0 else torch.minimum(nearest, distance)
        return x[chosen]


def _nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each row, the first of equal ones, and its distance squared."""
    found = list(search(squared_euclidean, x, 1, centres, ref_includes_query=False))
    return torch.cat([each[2] for each in found])[:, 0], torch.cat([each[1] for each in found])[:, 0]


def _centres(x: Tensor, clusters: Tensor, distances: Tensor, number: int) -> Tensor:
    """The mean of each cluster; of those without a row, the rows farthest from their centres."""
    sums = x.new_zeros(number, x.shape[1], dtype=torch.float64).index_add_(0, clusters, x.double())
    sizes = clusters.bincount(minlength=number)
    centres = (sums / sizes.clamp(min=1)[:, None]).float()
    empty = (sizes == 0).nonzero()[:, 0]
    centres[empty] = x[distances.argsort(descending=True, stable=True)[: len(empty)]]
    return centres


def numbered(labels: Tensor) -> Any:
    """Labels as numpy numbers 0, 1, ..., as scikit-learn takes them."""
    return distinct(torch.as_tensor(labels))[1].cpu().numpy()


def sklearn_metrics() -> Any:
    """scikit-learn's module of scores.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return import_module("sklearn.metrics")
    except ImportError as error:
        raise ImportError(
            'NMI and AMI need scikit-learn: pip install "gradbank[evaluation]", or leave them out with '
            "exclude=('NMI', 'AMI')",
            name="sklearn",
        ) from error
