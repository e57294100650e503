"""InferenceModel: embedding, storing and looking up."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_metric_learning.distances as pml_distances
import torch
from pytorch_metric_learning.utils import inference as pml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from gradbank.distances import CosineSimilarity, LpDistance
from gradbank.evaluation import CustomKNN, ExactKNN, InferenceModel, MatchFinder


def model(trunk: nn.Module, **arguments: Any) -> InferenceModel:
    return InferenceModel(trunk, **{"knn_func": ExactKNN(), "data_device": "cpu", **arguments})


def parts() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5)), nn.Linear(8, 4)


@pytest.mark.parametrize("normalize", [True, False])
def test_embeddings_are_those_of_pml(normalize: bool) -> None:
    trunk, embedder = parts()
    x = torch.randn(10, 6)
    ours = model(trunk, embedder=embedder, normalize_embeddings=normalize)
    theirs = pml.InferenceModel(
        trunk, embedder, normalize_embeddings=normalize, knn_func=ExactKNN(), data_device=torch.device("cpu")
    )
    trunk.train()
    found = ours.get_embeddings(x)
    assert not trunk.training
    assert not found.requires_grad
    torch.testing.assert_close(found, theirs.get_embeddings(x), atol=0, rtol=0)
    torch.testing.assert_close(ours.get_embeddings(list(x)), found, atol=0, rtol=0)
    assert model(nn.Identity(), dtype=torch.float64).get_embeddings(x).dtype == torch.float64


def test_inputs_may_be_a_tensor_a_list_or_a_dataset() -> None:
    trunk, _ = parts()
    x, labels = torch.randn(10, 6), torch.arange(10)
    inference = model(trunk)
    wanted = inference.get_embeddings(x)
    for inputs in (x, list(x), TensorDataset(x, labels), TensorDataset(x), TensorDataset(x, labels, labels)):
        found = inference.get_embeddings_from_tensor_or_dataset(inputs, batch_size=3)
        torch.testing.assert_close(found, wanted)
    with pytest.raises(TypeError, match="a tensor, a list or a dataset, got int"):
        inference.train_knn(3)
    with pytest.raises(ValueError, match="nothing to embed"):
        inference.train_knn([])


def test_what_is_not_a_tensor_goes_to_the_model_as_it_is() -> None:
    class Length(nn.Module):
        def forward(self, words: list[str]) -> Tensor:
            return torch.tensor([[float(len(word)), 1.0] for word in words])

    class Words(Dataset[tuple[str, int]]):
        def __len__(self) -> int:
            return 9

        def __getitem__(self, index: int) -> tuple[str, int]:
            if index >= 9:
                raise IndexError
            return "x" * (index + 1), 0

    inference = model(Length(), normalize_embeddings=False)
    inference.train_knn(Words(), batch_size=4)
    inference.add_to_knn(["y" * 20, "y" * 30], batch_size=1)
    far, rows = inference.get_nearest_neighbors(["dog", "y" * 29], k=1)
    assert rows.tolist() == [[2], [10]]
    assert far.tolist() == [[0], [1]]


@pytest.mark.parametrize("knn", [ExactKNN, lambda: CustomKNN(CosineSimilarity())])
def test_the_nearest_stored_item_is_found_after_loading_too(tmp_path: Path, knn: Callable[[], Any]) -> None:
    trunk, _ = parts()
    x = torch.randn(20, 6)
    inference = model(trunk, knn_func=knn())
    with pytest.raises(ValueError, match="no references"):
        inference.get_nearest_neighbors(x, 2)
    inference.train_knn(x[:12], batch_size=5)
    inference.add_to_knn(x[12:])
    inference.save_knn_func(tmp_path / "stored")
    loaded = model(trunk, knn_func=knn())
    loaded.load_knn_func(tmp_path / "stored")
    for each in (inference, loaded):
        far, rows = each.get_nearest_neighbors(x, k=3)
        assert rows.shape == far.shape == (20, 3)
        assert rows[:, 0].tolist() == list(range(20))
    inference.train_knn(x[:4])
    _, rows = inference.get_nearest_neighbors([x[0]], k=4)
    assert sorted(rows[0].tolist()) == [0, 1, 2, 3]


def test_matches_are_those_of_pml() -> None:
    trunk, embedder = parts()
    x, y = torch.randn(12, 6), torch.randn(7, 6)
    ours = model(trunk, embedder=embedder, match_finder=MatchFinder(LpDistance(), threshold=0.8))
    theirs = pml.InferenceModel(
        trunk,
        embedder,
        pml.MatchFinder(pml_distances.LpDistance(), threshold=0.8),
        knn_func=ExactKNN(),
        data_device=torch.device("cpu"),
    )
    for given in ((x,), (x, y), (x, y, 0.5), (x, y, None, True)):
        found = ours.get_matches(*given)
        assert len(found) > 0
        np.testing.assert_array_equal(found, theirs.get_matches(*given))
    np.testing.assert_array_equal(ours.is_match(x[:7], y), theirs.is_match(x[:7], y))
    assert ours.is_match(x[:1], x[:1]) is True


def test_by_default_a_cosine_of_nine_tenths_matches() -> None:
    inference = model(nn.Identity())
    x = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.45], [1.0, 0.52]])) * 7
    assert inference.get_matches(x[:1], x[1:], return_tuples=True) == [(0, 0)]


class Images(Dataset[Tensor]):
    """Items that are inputs, without a label."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def test_a_dataset_may_have_no_labels() -> None:
    torch.manual_seed(0)
    images = torch.randn(10, 3, 4)
    found = model(nn.Flatten()).get_embeddings_from_tensor_or_dataset(Images(images), batch_size=4)
    assert torch.equal(found, F.normalize(images.flatten(1), dim=1))


def test_a_model_can_be_copied_and_pickled() -> None:
    x = torch.randn(10, 6)
    made = model(parts()[0])
    made.train_knn(x)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other.get_nearest_neighbors(x, 2)[1], made.get_nearest_neighbors(x, 2)[1])
