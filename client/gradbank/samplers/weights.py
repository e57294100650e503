"""Items drawn the more often, the more a miner finds of them."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, WeightedRandomSampler

from gradbank.samplers.random import SamplingError, choose, source
from gradbank.suggestion import did_you_mean

# Of PML's tester, which also tests: what it is told of that does not change the embeddings.
UNUSED = {
    "use_trunk_output", "label_hierarchy_level", "end_of_testing_hook", "dataset_labels", "set_min_label_to_zero",
    "accuracy_calculator", "visualizer", "visualizer_hook",
}  # fmt: skip


class TuplesToWeightsSampler(Sampler[int]):
    """Embeds the dataset at the start of each epoch, mines it, and draws items by how often they were mined.

        weight[i] = (how often i is in a mined pair or triplet) / (the largest such number)

    Where nothing is mined, all items weigh the same.

    Args:
        model: gives embeddings; it is put in evaluation mode for them, and stays so.
        miner: called with `(N, D)` embeddings and `(N,)` labels.
        dataset: of `(input, label)` items.
        subset_size: embed, mine and draw from this many items, chosen anew each epoch; None is all.
        generator: where to draw from; by default the subset comes from numpy's global generator and the rest from
            torch's.
        tester_kwargs: those of PML's testers, of which `normalize_embeddings`, `batch_size`,
            `dataloader_num_workers`, `pca`, `data_device`, `dtype` and `data_and_label_getter` matter here.

    Attributes:
        weights: `(N,)` float32, of the last epoch.

    Raises:
        TypeError: another argument.
    """

    def __init__(
        self,
        model: nn.Module,
        miner: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
        dataset: "Dataset[Any]",
        subset_size: int | None = None,
        generator: torch.Generator | None = None,
        **tester_kwargs: Any,
    ) -> None:
        self.model = model
        self.miner = miner
        self.dataset = dataset
        self.subset_size = subset_size
        self.generator = generator
        self.weights: Tensor | None = None
        options = {name: each for name, each in tester_kwargs.items() if name not in UNUSED}
        for name in options.keys() - _OPTIONS:
            raise TypeError(f"TuplesToWeightsSampler takes no argument {name!r}{did_you_mean(name, _OPTIONS)}")
        self.embed = _Embedder(**options)

    def __len__(self) -> int:
        return self.subset_size or len(self.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]
        chosen = np.arange(size)
        if self.subset_size:
            chosen = choose(source(self.generator), chosen, self.subset_size)
        embeddings, labels = self.embed(self.model, Subset(self.dataset, chosen.tolist()))
        mined = self.miner(embeddings, labels)
        self.weights = torch.zeros(size, device=embeddings.device)
        self.weights[torch.from_numpy(chosen).to(embeddings.device)] = _share(mined, len(chosen))
        draw = WeightedRandomSampler(self.weights.tolist(), len(self), replacement=True, generator=self.generator)
        return iter(draw)


def _share(mined: tuple[Tensor, ...], size: int) -> Tensor:
    """`(size,)` float32: how often each item was mined, over the most that one was; ones if none was."""
    times = torch.cat(mined).bincount(minlength=size).float()
    return torch.where(times.amax() > 0, times / times.amax(), 1.0)


class _Embedder:
    """Embeds a dataset as PML's testers do."""

    def __init__(
        self,
        normalize_embeddings: bool = True,
        batch_size: int = 32,
        dataloader_num_workers: int = 2,
        pca: int | None = None,
        data_device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        data_and_label_getter: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.normalize_embeddings = normalize_embeddings
        self.batch_size = int(batch_size)
        self.workers = dataloader_num_workers
        self.pca = pca
        self.device = torch.device(data_device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype
        self.getter = data_and_label_getter or _as_it_is

    def __call__(self, model: nn.Module, dataset: "Dataset[Any]") -> tuple[Tensor, Tensor]:
        """`(N, D)` embeddings and `(N,)` labels, in the order of the dataset."""
        model.eval()
        found: list[Tensor] = []
        known: list[Tensor] = []
        with torch.no_grad():
            for batch in DataLoader(dataset, self.batch_size, num_workers=self.workers):
                inputs, labels = self.getter(batch)
                found.append(model(inputs.to(self.device, self.dtype)))
                known.append(torch.as_tensor(labels).to(self.device))
        embeddings, labels = torch.cat(found), torch.cat(known)
        labels = labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
        if labels.ndim != 1:
            raise SamplingError(f"the dataset must give one label per item, got labels of shape {tuple(labels.shape)}")
        if self.pca:
            embeddings = _principal(embeddings, self.pca)
        return (F.normalize(embeddings) if self.normalize_embeddings else embeddings), labels


def _as_it_is(batch: Any) -> Any:  # a function with a name can be pickled
    return batch


def _principal(embeddings: Tensor, size: int) -> Tensor:
    """`(N, size)`: the principal components of embeddings whose dimensions were first scaled to unit variance."""
    scaled = (embeddings - embeddings.mean(0)) / embeddings.std(0)
    _, _, directions = torch.linalg.svd(scaled, full_matrices=False)
    projected: Tensor = scaled @ directions[:size].mT
    return projected


_OPTIONS = set(inspect.signature(_Embedder).parameters)
