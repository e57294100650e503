"""A trained model, with what it takes to look things up by their embeddings."""

from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from gradbank.distances import CosineSimilarity
from gradbank.evaluation.faiss import FaissKNN, has_faiss
from gradbank.evaluation.matches import Mask, MatchFinder
from gradbank.evaluation.neighbors import ExactKNN


class InferenceModel:
    """Embeds inputs with a model, finds their nearest neighbours among stored ones, and tells which match.

    Inputs are a batch as the model takes it, or a list of tensors, one per item. The model is put in evaluation
    mode, and stays so.

    Args:
        trunk: the model, and embedder: a second part, applied to what the first gives.
        match_finder: by default pairs of cosine similarity 0.9 or more match.
        normalize_embeddings: divide each embedding by its Euclidean norm.
        knn_func: by default `FaissKNN` where faiss is installed, else `ExactKNN`; it must keep what it stores.
        data_device: where inputs are put, the model being there; a GPU by default if there is one.
        dtype: what inputs are cast to; None is as they are.
    """

    def __init__(
        self,
        trunk: nn.Module,
        embedder: nn.Module | None = None,
        match_finder: MatchFinder | None = None,
        normalize_embeddings: bool = True,
        knn_func: Any = None,
        data_device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.trunk = trunk
        self.embedder = nn.Identity() if embedder is None else embedder
        self.match_finder = match_finder or MatchFinder(CosineSimilarity(), threshold=0.9)
        self.normalize_embeddings = normalize_embeddings
        if knn_func is None:
            knn_func = FaissKNN(reset_before=False, reset_after=False) if has_faiss() else ExactKNN()
        self.knn_func = knn_func
        self.data_device = torch.device(data_device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype

    def get_embeddings(self, x: Any) -> Tensor:
        """`(N, D)` embeddings of one batch, without gradients."""
        x = _stacked(x)
        if isinstance(x, Tensor):
            x = x.to(self.data_device, self.dtype)
        self.trunk.eval()
        self.embedder.eval()
        with torch.no_grad():
            embeddings: Tensor = self.embedder(self.trunk(x))
        return F.normalize(embeddings, dim=1) if self.normalize_embeddings else embeddings

    def get_embeddings_from_tensor_or_dataset(self, inputs: Any, batch_size: int) -> Tensor:
        """`(N, D)` embeddings of a tensor, a list, or a dataset of `(input, ...)` or inputs, `batch_size` at a
        time.

        Raises:
            TypeError: anything else.
            ValueError: nothing to embed.
        """
        inputs = _stacked(inputs)
        if isinstance(inputs, Tensor | list):
            batches: Any = (inputs[i : i + batch_size] for i in range(0, len(inputs), batch_size))
        elif isinstance(inputs, Dataset):
            batches = (
                batch[0] if isinstance(batch, list | tuple) else batch
                for batch in DataLoader(inputs, batch_size=batch_size)
            )
        else:
            raise TypeError(f"inputs must be a tensor, a list or a dataset, got {type(inputs).__name__}")
        embeddings = [self.get_embeddings(batch) for batch in batches]
        if not embeddings:
            raise ValueError("there is nothing to embed: inputs are empty")
        return torch.cat(embeddings)

    def train_knn(self, inputs: Any, batch_size: int = 64) -> None:
        """Stores the embeddings of a tensor, list or dataset as references, in place of what was stored."""
        self.call_knn(self.knn_func.train, inputs, batch_size)

    def add_to_knn(self, inputs: Any, batch_size: int = 64) -> None:
        """Stores the embeddings of a tensor, list or dataset as further references."""
        self.call_knn(self.knn_func.add, inputs, batch_size)

    def call_knn(self, func: Callable[[Tensor], Any], inputs: Any, batch_size: int) -> None:
        """Calls `func` with the embeddings of a tensor, list or dataset."""
        func(self.get_embeddings_from_tensor_or_dataset(inputs, batch_size))

    def get_nearest_neighbors(self, query: Any, k: int) -> tuple[Tensor, Tensor]:
        """`(N, k)` distances and `(N, k)` numbers of the stored references nearest to a batch.

        Raises:
            ValueError: none are stored, or, by `ExactKNN`, fewer than k (faiss fills up with -1).
        """
        distances, indices = self.knn_func(self.get_embeddings(query), k)
        return distances, indices

    def get_matches(
        self, query: Any, ref: Any = None, threshold: float | None = None, return_tuples: bool = False
    ) -> Mask | list[tuple[int, int]]:
        """Which of a batch match which of another, or of itself: see `MatchFinder.get_matching_pairs`."""
        embeddings = self.get_embeddings(query)
        references = None if ref is None else self.get_embeddings(ref)
        return self.match_finder.get_matching_pairs(embeddings, references, threshold, return_tuples)

    def is_match(self, x: Any, y: Any, threshold: float | None = None) -> bool | Mask:
        """Whether each of a batch matches that in the same place of another: see `MatchFinder.is_match`."""
        return self.match_finder.is_match(self.get_embeddings(x), self.get_embeddings(y), threshold)

    def save_knn_func(self, filename: "str | PathLike[str]") -> None:
        """Writes the stored references to a file."""
        self.knn_func.save(filename)

    def load_knn_func(self, filename: "str | PathLike[str]") -> None:
        """Reads stored references from a file."""
        self.knn_func.load(filename)


def _stacked(inputs: Any) -> Any:
    """A list of tensors as one; anything else as it is."""
    if isinstance(inputs, list) and inputs and all(isinstance(each, Tensor) for each in inputs):
        return torch.stack(inputs)
    return inputs
