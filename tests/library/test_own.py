"""Components of a user's own, here, in an engine and on a server."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import distances, engine, losses, miners
from gradbank.component import component
from gradbank.engine import Anchors, LogSumExp, Part, Statistic
from gradbank.errors import InvalidComponent
from gradbank_server.build import build

from .conftest import sent


@pytest.fixture
def own() -> tuple[type[distances.Distance], type[losses.PairLoss]]:
    """A distance and a loss, as a user would write them."""

    @component
    class MahalanobisDistance(distances.Distance):
        """A distance whose axes weigh differently."""

        weight: float = 2.0

        def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
            scale = torch.linspace(1, self.weight, query_emb.shape[-1], dtype=query_emb.dtype)
            return torch.cdist(query_emb * scale, ref_emb * scale)

    @component
    class SoftNearestLoss(losses.PairLoss):
        """`log(1 + sum_p exp(-s) sum_n exp(s))` for each anchor."""

        temperature: float = 0.5
        distance: distances.Distance = field(default_factory=MahalanobisDistance, kw_only=True)

        def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
            return {"near": LogSumExp(lambda s: self.distance.closeness(s) / self.temperature)}

        def terms(self, anchors: Anchors) -> Mapping[str, Part]:
            far = anchors.logsumexp(-self.distance.closeness(anchors.s) / self.temperature)
            losses = torch.logaddexp(far + anchors.found["near"].value, torch.zeros(anchors.size))
            return {"loss": anchors.per_anchor(losses)}

    return MahalanobisDistance, SoftNearestLoss


def value_and_gradient(loss: Any, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, labels)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def test_own_loss_and_distance_work_everywhere(own: Any, embedded: gradbank.Client, name: str) -> None:
    own_distance, own_loss = own
    torch.manual_seed(0)
    embeddings, labels = torch.randn(12, 4), torch.randint(3, (12,))
    loss = own_loss(0.3, distance=own_distance(weight=3.0))
    mat = loss.distance(embeddings) / 0.3
    same, own_row = labels[:, None] == labels, torch.eye(12, dtype=torch.bool)
    wanted = [
        torch.log1p(mat[a][same[a] & ~own_row[a]].exp().sum() * (-mat[a][~same[a]]).exp().sum()) for a in range(12)
    ]
    with engine.using("dense"):
        dense = value_and_gradient(loss, embeddings, labels)
    torch.testing.assert_close(dense[0], torch.stack(wanted).mean(), rtol=1e-5, atol=0)
    with engine.using("tiled", engine.Bounds(tile=9, rows=2, positives=3)):
        torch.testing.assert_close(value_and_gradient(loss, embeddings, labels), dense, rtol=1e-4, atol=1e-6)
    bank = losses.CrossBatchMemory(loss, 4, 30, miners.MultiSimilarityMiner(distance=own_distance()))
    assert build(sent(bank.spec())).spec() == bank.spec()
    remote = embedded.open(name, bank)
    for _ in range(5):
        batch = torch.randn(8, 4), torch.randint(3, (8,))
        assert all(map(torch.equal, value_and_gradient(remote, *batch), value_and_gradient(bank, *batch)))
    embedded.close_session(name)


def test_a_class_whose_arguments_a_server_cannot_be_told_is_not_hosted() -> None:
    @component
    class Rescaled(losses.BaseMetricLossFunction):
        def __init__(self, scale: float = 2.0, **more: Any) -> None:
            super().__init__(**more)
            self.scale = scale

    with gradbank.connect("local://") as client:
        with pytest.raises(
            InvalidComponent, match=r"Rescaled.__init__ takes scale, of which a server cannot be told: declare"
        ):
            client.open("own", Rescaled(3.0))
        assert client.sessions() == []
