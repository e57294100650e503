"""TuplesToWeightsSampler: what is mined more often is drawn more often."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import pytorch_metric_learning.miners as pml_miners
import pytorch_metric_learning.samplers as pml
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gradbank.miners import MultiSimilarityMiner
from gradbank.samplers import TuplesToWeightsSampler


def dataset(labels: Any = None) -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(50, 4), torch.randint(5, (50,)) if labels is None else labels)


def sampler(miner: Any, data: Any = None, **arguments: Any) -> TuplesToWeightsSampler:
    arguments = {"dataloader_num_workers": 0, "data_device": "cpu", **arguments}
    return TuplesToWeightsSampler(nn.Identity(), miner, data or dataset(), **arguments)


class Seen:
    """A miner that keeps what it was given."""

    def __call__(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        self.embeddings, self.labels = embeddings, labels
        none = torch.zeros(0, dtype=torch.int64)
        return none, none, none


@pytest.mark.parametrize("subset", [None, 20])
def test_weights_and_draws_are_those_of_pml(
    subset: int | None,
) -> None:
    results = []
    theirs = pml.TuplesToWeightsSampler(
        nn.Identity(),
        pml_miners.MultiSimilarityMiner(epsilon=-0.2),
        dataset(),
        subset_size=subset,
        dataloader_num_workers=0,
        data_device=torch.device("cpu"),
        accuracy_calculator=object(),
    )
    ours = sampler(MultiSimilarityMiner(epsilon=-0.2), subset_size=subset, accuracy_calculator=object())
    before = np.random.get_state()
    for each in (ours, theirs):
        np.random.seed(3)
        torch.manual_seed(4)
        drawn = list(each)
        assert len(drawn) == len(each) == (subset or 50)
        results.append((drawn, each.weights))
    np.random.set_state(before)
    assert results[0][0] == results[1][0]
    weights = results[0][1]
    assert weights is not None
    torch.testing.assert_close(weights, results[1][1], atol=0, rtol=0)
    assert weights.max() == 1
    assert len(weights.unique()) > 3
    assert bool((weights[results[0][0]] > 0).all())


def test_a_weight_is_how_often_an_item_is_mined() -> None:
    def miner(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([3, 3])

    made = sampler(miner)
    drawn = set(made)
    assert made.weights is not None
    assert made.weights[:5].tolist() == [1, 0.5, 0.5, 1, 0]
    assert drawn <= {0, 1, 2, 3}


def test_where_nothing_is_mined_all_weigh_the_same() -> None:
    made = sampler(Seen(), subset_size=10)
    assert len(set(made)) <= 10
    assert made.weights is not None
    assert sorted(made.weights.tolist()) == [0] * 40 + [1] * 10


def test_a_generator_draws_alone() -> None:
    def epochs() -> list[list[int]]:
        made = sampler(Seen(), subset_size=10, generator=torch.Generator().manual_seed(1))
        return [list(made), list(made)]

    first = epochs()
    torch.manual_seed(9)
    assert epochs() == first
    assert first[0] != first[1]


def test_items_are_embedded_in_their_order_as_asked() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return 2 * x

    data = dataset(torch.arange(50)[:, None])
    seen = Seen()
    made = TuplesToWeightsSampler(
        Doubled(), seen, data, dataloader_num_workers=0, batch_size=7, normalize_embeddings=False, dtype=torch.float64,
        data_device="cpu", data_and_label_getter=lambda batch: (batch[0] + 1, batch[1]),
    )  # fmt: skip
    iter(made)
    torch.testing.assert_close(seen.embeddings, 2 * (data.tensors[0] + 1).double())
    assert seen.labels.tolist() == list(range(50))


def test_principal_components_are_those_of_scikit_learn() -> None:
    seen = Seen()
    data = dataset()
    iter(sampler(seen, data, pca=2, normalize_embeddings=False))
    scaled = StandardScaler().fit_transform(data.tensors[0].numpy()) * np.sqrt(49 / 50)  # torch's std divides by N - 1
    wanted = PCA(2).fit_transform(scaled)
    np.testing.assert_allclose(seen.embeddings.abs().numpy(), np.abs(wanted), rtol=1e-4, atol=1e-5)


def test_other_arguments_and_labels_are_refused() -> None:
    with pytest.raises(
        TypeError, match="TuplesToWeightsSampler takes no argument 'batchsize'; did you mean 'batch_size'"
    ):
        sampler(Seen(), batchsize=3)
    with pytest.raises(ValueError, match="one label per item"):
        iter(sampler(Seen(), dataset(torch.zeros(50, 2))))


def test_it_can_be_copied_and_pickled() -> None:
    made = sampler(MultiSimilarityMiner())
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        draws = []
        for each in (made, other):
            torch.manual_seed(0)
            draws.append(list(each))
        assert draws[0] == draws[1]
