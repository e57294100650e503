"""Neighbours and clusters by faiss, where it is installed."""

import logging
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradbank.evaluation.neighbors import BUDGET, KNN, Found, without_self

log = logging.getLogger(__name__)

LARGEST_GPU_K = 2048  # of faiss


class FaissKNN(KNN):
    """The nearest neighbours by a faiss index: by default exact, in float32, by squared Euclidean distance.

    Args:
        reset_before: start each call from a new index; False keeps the one made by `train`, `load` or by hand.
        reset_after: drop the index after each call.
        index_init_fn: makes an index from the dimension; `faiss.IndexFlatL2` by default.
        gpus: the GPUs to search on; by default all of them if the queries are on one, else none.

    Raises:
        ImportError: faiss is not installed.
        TypeError: `gpus` that is not a tuple or list.
        ValueError: no GPU in it.

    Johnson et al., "Billion-Scale Similarity Search with GPUs", IEEE Transactions on Big Data 2021.
    """

    def __init__(
        self,
        reset_before: bool = True,
        reset_after: bool = True,
        index_init_fn: Callable[[int], Any] | None = None,
        gpus: Sequence[int] | None = None,
    ) -> None:
        if gpus is not None and not isinstance(gpus, list | tuple):
            raise TypeError(f"gpus must be a list of numbers, got {gpus!r}")
        if gpus is not None and len(gpus) == 0:
            raise ValueError("gpus must name one at least; leave it out to search where the queries are")
        self.index_init_fn = index_init_fn or _faiss().IndexFlatL2
        self.reset_before = reset_before
        self.reset_after = reset_after
        self.gpus = gpus
        self.index: Any = None

    def chunks(self, query: Tensor, k: int, reference: Tensor | None, ref_includes_query: bool) -> Iterator[Found]:
        if self.reset_before:
            self.index = self.index_init_fn(query.shape[1])
        if self.index is None:
            raise ValueError("there is no index: make one with train(embeddings) or load(filename)")
        if reference is not None:
            self.index.add(_rows(reference))
        wanted = k + int(ref_includes_query)
        index = self._placed(wanted, query.is_cuda)
        step = max(BUDGET // wanted, 1)
        for start in range(0, len(query), step):
            block = query[start : start + step]
            found = index.search(_rows(block), wanted)
            distances, indices = (torch.from_numpy(each).to(query.device) for each in found)
            if ref_includes_query:
                distances, indices = without_self(distances, indices, start)
            yield slice(start, start + len(block)), distances, indices
        if self.reset_after:
            self.reset()

    def train(self, embeddings: Tensor) -> None:
        """Makes an index of `(M, D)` references."""
        self.index = self.index_init_fn(embeddings.shape[1])
        if not self.index.is_trained:
            self.index.train(_rows(embeddings))
        self.add(embeddings)

    def add(self, embeddings: Tensor) -> None:
        """Adds `(M, D)` references to the index.

        Raises:
            ValueError: there is no index.
        """
        if self.index is None:
            raise ValueError("there is no index to add to: make one with train(embeddings)")
        self.index.add(_rows(embeddings))

    def save(self, filename: "str | PathLike[str]") -> None:
        """Writes the index to a file."""
        _faiss().write_index(self.index, fspath(filename))

    def load(self, filename: "str | PathLike[str]") -> None:
        """Reads an index from a file."""
        self.index = _faiss().read_index(fspath(filename))

    def reset(self) -> None:
        """Drops the index."""
        self.index = None

    def _placed(self, k: int, is_cuda: bool) -> Any:
        """The index to search: a copy on the GPUs, where there are any and they can."""
        if not (is_cuda or self.gpus) or _faiss().get_num_gpus() == 0:
            return self.index
        if k > LARGEST_GPU_K:
            log.warning(f"searching on the CPU: faiss finds {LARGEST_GPU_K} neighbours at most on a GPU, not {k}")
            return self.index
        if self.gpus is None:
            return _faiss().index_cpu_to_all_gpus(self.index)
        return _faiss().index_cpu_to_gpus_list(self.index, gpus=list(self.gpus))


class FaissKMeans:
    """k-means by faiss; the arguments are those of `faiss.Kmeans`, such as `niter` and `seed`.

    Raises:
        ImportError: faiss is not installed.
    """

    def __init__(self, **kwargs: Any) -> None:
        _faiss()  # now, rather than after an epoch
        self.kwargs = kwargs

    def __call__(self, x: Tensor, nmb_clusters: int) -> Tensor:
        """`(N,)` int64: the cluster of each of `(N, D)` embeddings."""
        rows = _rows(x)
        kmeans = _faiss().Kmeans(rows.shape[1], nmb_clusters, **self.kwargs)
        kmeans.train(rows)
        _, nearest = kmeans.index.search(rows, 1)
        return torch.from_numpy(nearest[:, 0]).to(x.device)


def _rows(embeddings: Tensor) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """As faiss takes them: float32, row by row, on the host."""
    return np.ascontiguousarray(torch.as_tensor(embeddings).detach().to("cpu", torch.float32).numpy())


def has_faiss() -> bool:
    """Whether faiss is installed; it is not imported for the answer."""
    return find_spec("faiss") is not None


def _faiss() -> Any:
    # By name, since type checkers and this package's own rules for imports should not ask for an extra.
    try:
        return import_module("faiss")
    except ImportError as error:
        raise ImportError(
            'FaissKNN and FaissKMeans need faiss: pip install "gradbank[cpu]", or "gradbank[gpu]"; '
            "ExactKNN and KMeans need nothing",
            name="faiss",
        ) from error
