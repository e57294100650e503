"""A distance of embeddings that are no vectors, as late interaction has it: one text, run with either library."""

from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.miners as pml_miners
import torch
from torch import Tensor

from gradbank import distances, engine, losses, miners


def max_sim(library: Any) -> Any:
    """How near each token of one embedding is to the nearest of another, both `(B, T, D)`."""

    class MaxSim(library.BaseDistance):  # type: ignore[misc]
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(is_inverted=True, **kwargs)

        def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
            return torch.einsum("itd,jsd->ijts", query_emb, ref_emb).amax(3).mean(2)

        def check_shapes(self, query_emb: Tensor, ref_emb: Tensor | None) -> None:
            assert query_emb.ndim == 3, "tokens are needed"

        def maybe_normalize(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
            return torch.nn.functional.normalize(embeddings, dim=-1)

    return MaxSim()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(16, 3, 8), torch.randint(4, (16,))


@pytest.mark.parametrize("how", ["dense", "tiled"])
@pytest.mark.parametrize("name", ["TripletMarginLoss", "NTXentLoss", "MultiSimilarityLoss", "SupConLoss", "MarginLoss"])
@pytest.mark.parametrize("references", [False, True])
def test_a_loss_is_that_of_pml(how: str, name: str, references: bool) -> None:
    embeddings, labels = batch()
    others = {"ref_emb": torch.randn(20, 5, 8), "ref_labels": torch.randint(4, (20,))} if references else {}
    ours, theirs = (embeddings.clone().requires_grad_() for _ in range(2))
    with engine.using(how):
        loss = getattr(losses, name)(distance=max_sim(distances))(ours, labels, **others)
        loss.backward()
    wanted = getattr(pml_losses, name)(distance=max_sim(pml_distances))(theirs, labels, **others)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["MultiSimilarityMiner", "TripletMarginMiner", "BatchHardMiner", "PairMarginMiner"])
def test_a_miner_takes_what_that_of_pml_takes(name: str) -> None:
    embeddings, labels = batch()
    found = getattr(miners, name)(distance=max_sim(distances))(embeddings, labels)
    wanted = getattr(pml_miners, name)(distance=max_sim(pml_distances))(embeddings, labels)
    for part in (slice(2), slice(2, None)):
        assert set(zip(*(i.tolist() for i in found[part]))) == set(zip(*(i.tolist() for i in wanted[part])))


@pytest.mark.parametrize("symmetric", [False, True])
def test_two_views_may_be_of_another_shape(symmetric: bool) -> None:
    embeddings, view = batch()[0], torch.randn(16, 3, 8)
    found = losses.SelfSupervisedLoss(losses.NTXentLoss(distance=max_sim(distances)), symmetric)(embeddings, view)
    theirs = pml_losses.SelfSupervisedLoss(pml_losses.NTXentLoss(distance=max_sim(pml_distances)), symmetric)
    torch.testing.assert_close(found, theirs(embeddings, view))


def test_the_distance_says_what_it_takes() -> None:
    embeddings, labels = batch()
    for each in (losses.NTXentLoss, miners.BatchHardMiner):
        with pytest.raises(AssertionError, match="tokens are needed"):
            each(distance=max_sim(distances))(embeddings[:, 0], labels)
        with pytest.raises(ValueError, match="must be \\(batch, dimension\\)"):
            each()(embeddings, labels)
