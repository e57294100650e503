"""Every loss in every use, as PML makes it and as gradbank does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import hypothesis
import pytest
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.miners as pml_miners
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import gradbank
from gradbank import losses, miners
from gradbank.engine import Bounds
from gradbank_server.service import Server

PAIR_LOSSES = ("ContrastiveLoss", "MultiSimilarityLoss", "NTXentLoss", "SupConLoss", "TripletMarginLoss")
USES = ("plain", "miner", "bank", "bank and miner")

BATCH, DIMENSION, CLASSES = 12, 8, 6
MEMORY = 50  # 20 batches go around it almost five times, and do not divide it

Batch = tuple[Tensor, Tensor]


class Answer(NamedTuple):
    value: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Case:
    """A loss and how it is used, independent of who computes it."""

    loss: str
    use: str

    def __str__(self) -> str:
        return f"{self.loss}, {self.use}"

    def ours(self) -> losses.Loss:
        made: losses.Loss = self._built(losses, miners)
        return made

    def theirs(self) -> nn.Module:
        return self._built(pml_losses, pml_miners)

    def _built(self, library: ModuleType, mining: ModuleType) -> Any:
        torch.manual_seed(0)  # both draw the same class weights
        made = getattr(library, self.loss)
        loss = made(CLASSES, DIMENSION) if self.loss == "ArcFaceLoss" else made()
        if not self.use.startswith("bank"):
            return loss
        miner = mining.MultiSimilarityMiner() if "miner" in self.use else None
        return library.CrossBatchMemory(loss, DIMENSION, memory_size=MEMORY, miner=miner)

    def answers(self, loss: nn.Module, batches: list[Batch]) -> list[Answer]:
        """What `loss`, wherever it is computed, says of each batch in turn."""
        mining = pml_miners if type(loss).__module__.startswith("pytorch_metric_learning") else miners
        mine = mining.MultiSimilarityMiner() if self.use == "miner" else None
        found = []
        for embeddings, labels in batches:
            leaf = embeddings.clone().requires_grad_()
            value = loss(leaf, labels) if mine is None else loss(leaf, labels, mine(leaf, labels))
            value.backward()
            assert leaf.grad is not None
            found.append(Answer(value.detach(), leaf.grad))
        return found


@pytest.fixture(params=[Case(loss, use) for loss in PAIR_LOSSES for use in ("bank", "bank and miner")], ids=str)
def bank(request: pytest.FixtureRequest) -> Case:
    made: Case = request.param
    return made


@pytest.fixture(
    params=[Case(loss, use) for loss in PAIR_LOSSES for use in USES]
    + [Case("ArcFaceLoss", "plain"), Case("ArcFaceLoss", "miner")],
    ids=str,
)
def case(request: pytest.FixtureRequest) -> Case:
    made: Case = request.param
    return made


@pytest.fixture
def batches() -> Callable[..., list[Batch]]:
    """`batches(seed, dtype, steps)`: random batches, with all the digits that the dtype has."""

    def draw(seed: int, dtype: torch.dtype, steps: int = 20) -> list[Batch]:
        torch.manual_seed(seed)
        size = (BATCH, DIMENSION)
        return [(torch.randn(size, dtype=dtype), torch.randint(CLASSES, (BATCH,))) for _ in range(steps)]

    return draw


@pytest.fixture(params=["tcp", "unix", "shm", "local://"])
def host(request: pytest.FixtureRequest, nearby: Server) -> Iterator[gradbank.Client]:
    """A client of a server behind each way to it, and one of a server in this process; it ends with the test."""
    local = request.param == "local://"
    way = gradbank.connect("local://") if local else gradbank.connect(nearby.address, timeout=20, via=request.param)
    with way as connected:
        assert connected.via == request.param.removesuffix("://")
        yield connected


bounds = st.builds(Bounds, tile=st.integers(1, 200), rows=st.integers(1, 8), positives=st.integers(1, 40))


def examples(number: int) -> hypothesis.settings:
    checks = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    return hypothesis.settings(
        max_examples=number, deadline=None, database=None, derandomize=True, suppress_health_check=checks
    )
