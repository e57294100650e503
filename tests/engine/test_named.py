"""Pairs that are named one by one: looked up in a matrix where that is sooner, whatever their order."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

import gradbank.engine.named
from gradbank import distances, losses, miners
from gradbank.engine import References, listed_distances

DISTANCES = [
    distances.LpDistance(),
    distances.LpDistance(p=3, power=2),
    distances.CosineSimilarity(),
    distances.DotProductSimilarity(normalize_embeddings=False),
    distances.SNRDistance(),
]


@pytest.mark.parametrize("distance", DISTANCES, ids=str)
@pytest.mark.parametrize(
    ("pairs", "entries"),
    [(40, 2**22), (4000, 2**22), (4000, 300), (4000, 1)],
    ids=["few", "many", "by blocks", "by row"],
)
def test_what_is_named_is_what_the_matrix_has(distance: distances.Distance, pairs: int, entries: int) -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(60, 5, dtype=torch.float64, requires_grad=True)
    others = torch.randn(70, 5, dtype=torch.float64, requires_grad=True)
    a, b = torch.randint(10, 60, (pairs,)), torch.randint(70, (pairs,))  # some rows are in no pair
    upstream = torch.randn(pairs, dtype=torch.float64)
    with patch.object(gradbank.engine.named, "_ENTRIES", entries):
        found = listed_distances(distance, embeddings, References((others,)), a, b)
        gradients = torch.autograd.grad(found, (embeddings, others), upstream)
    wanted = distance(embeddings, others)[a, b]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients, torch.autograd.grad(wanted, (embeddings, others), upstream))


def test_no_pairs_have_no_distances() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    for distance in (distances.LpDistance(), MatrixOnly()):
        assert listed_distances(
            distance, torch.randn(3, 2), References((torch.randn(4, 2),)), nothing, nothing
        ).shape == (0,)


class MatrixOnly(distances.BaseDistance):
    """Whose distances of pairs are others than its matrix has, and have no gradient: PML never asks for them."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return torch.cdist(query_emb, ref_emb)

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return torch.as_tensor(np.ones(len(query_emb), dtype=np.float32))


@pytest.mark.parametrize("number", [4, 400])
@pytest.mark.parametrize("name", ["TripletMarginLoss", "MarginLoss"])
def test_a_distance_of_ones_own_is_its_matrix(number: int, name: str) -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(24, 8, requires_grad=True), torch.arange(24) % 6
    triplets = tuple(index[:number] for index in miners.TripletMarginMiner()(embeddings, labels))
    found = getattr(losses, name)(distance=MatrixOnly())(embeddings, labels, triplets)
    wanted = getattr(losses, name)(distance=distances.LpDistance())(embeddings, labels, triplets)
    torch.testing.assert_close(found, wanted)
    (of_found,), (of_wanted,) = (torch.autograd.grad(each, embeddings) for each in (found, wanted))
    torch.testing.assert_close(of_found, of_wanted, atol=1e-6, rtol=1e-5)
