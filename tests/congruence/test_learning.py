"""Class weights that learn: the same by the server's optimizer as by torch's, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.regularizers as pml_regularizers
import torch
from torch import Tensor

import gradbank
from gradbank import losses, regularizers

BATCH, DIMENSION, CLASSES = 16, 8, 10
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
    "Adam": {"lr": 0.05, "betas": (0.8, 0.99)},
    "AdamW": {"lr": 0.05, "amsgrad": True},
    "RMSprop": {"lr": 0.01, "momentum": 0.5},
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]] = {
    "steps": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "warm-up": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
}


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, DIMENSION, dtype=dtype), torch.randint(CLASSES, (BATCH,))


@pytest.mark.parametrize("options", [{}, {"margin": 10.0, "scale": 16.0}, {"margin": 57.3, "scale": 1.0}])
@pytest.mark.parametrize("regularized", [False, True])
def test_weight_gradient_equals_that_of_pml(options: dict[str, float], regularized: bool) -> None:
    torch.manual_seed(0)
    mine = {"weight_regularizer": regularizers.LpRegularizer(), "weight_reg_weight": 0.3} if regularized else {}
    pmls = {"weight_regularizer": pml_regularizers.LpRegularizer(), "weight_reg_weight": 0.3} if regularized else {}
    here = losses.ArcFaceLoss(CLASSES, DIMENSION, **options, **mine).double()
    theirs = pml_losses.ArcFaceLoss(CLASSES, DIMENSION, **options, **pmls).double()
    torch.nn.init.normal_(here.W)
    theirs.W.data.copy_(here.W.data)
    for _ in range(5):
        embeddings, labels = batch(torch.float64)
        gradients = []
        for loss in (here, theirs):
            loss.zero_grad()
            loss(embeddings, labels).backward()
            gradients.append(loss.W.grad.clone())
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(here.get_logits(embeddings), theirs.get_logits(embeddings), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_on_the_server_equals_training_here(
    optimizer: str, scheduler: str, host: gradbank.Client, name: str
) -> None:
    torch.manual_seed(1)
    here = losses.ArcFaceLoss(CLASSES, DIMENSION)
    remote = host.open(name, here)
    options = OPTIMIZERS[optimizer]
    optimizers = (getattr(torch.optim, optimizer)(here.parameters(), **options), remote.optimizer(optimizer, **options))
    schedulers = [SCHEDULERS[scheduler](each) for each in optimizers]
    for step in range(14):
        embeddings, labels = batch()
        leaves = [embeddings.clone().requires_grad_() for _ in optimizers]
        values = [loss(leaf, labels) for loss, leaf in zip((here, remote), leaves, strict=True)]
        assert torch.equal(*values), step
        for value, each in zip(values, optimizers, strict=True):
            each.zero_grad()
            (value * 3.7).backward()
            each.step()
        assert torch.equal(leaves[0].grad, leaves[1].grad)  # type: ignore[arg-type]
        for each in schedulers:
            each.step()
    copy = remote.local()
    assert isinstance(copy, losses.ArcFaceLoss)
    assert torch.equal(copy.W, here.W)


def test_gradients_accumulate_over_batches(host: gradbank.Client, name: str) -> None:
    torch.manual_seed(2)
    here = losses.ArcFaceLoss(CLASSES, DIMENSION)
    remote = host.open(name, here)
    ours, theirs = torch.optim.SGD(here.parameters(), lr=0.5), remote.optimizer("SGD", lr=0.5)
    for step in range(12):
        embeddings, labels = batch()
        values = here(embeddings, labels), remote(embeddings, labels)
        assert torch.equal(*values), step
        for value in values:
            (value / 4).backward()
        if step % 4 == 3:
            for each in (ours, theirs):
                each.step()
                each.zero_grad()
    assert torch.equal(remote.local().W, here.W)


def test_a_step_that_is_not_taken_changes_nothing(host: gradbank.Client, name: str) -> None:
    """Backward passes whose gradient is dropped, and batches without a backward pass, leave the weights."""
    torch.manual_seed(3)
    here = losses.ArcFaceLoss(CLASSES, DIMENSION)
    before = here.W.detach().clone()
    remote = host.open(name, here)
    optimizer = remote.optimizer("Adam", lr=0.1)
    for _ in range(3):
        embeddings, labels = batch()
        remote(embeddings, labels).backward()
        optimizer.zero_grad()
        with torch.no_grad():
            remote(embeddings, labels)
        optimizer.step()
    assert torch.equal(remote.local().W, before)


def test_miner_weighs_the_embeddings(host: gradbank.Client, name: str) -> None:
    """An embedding that no pair names costs nothing; the most named one counts in full."""
    torch.manual_seed(4)
    here = losses.ArcFaceLoss(CLASSES, DIMENSION)
    theirs = pml_losses.ArcFaceLoss(CLASSES, DIMENSION).double()
    theirs.W.data.copy_(here.W.data)
    remote = host.open(name, here)
    embeddings, labels = batch()
    listed = tuple(torch.tensor(each) for each in ([0, 0, 1], [2, 3, 2], [4, 5, 0]))
    leaf = embeddings.clone().requires_grad_()
    value = here(leaf, labels, listed)
    value.backward()
    assert leaf.grad is not None
    assert leaf.grad[:6].any(dim=1).all()
    assert not leaf.grad[6:].any()
    assert torch.equal(remote(embeddings, labels, listed), value)
    torch.testing.assert_close(value.double(), theirs(embeddings.double(), labels, listed), rtol=1e-5, atol=0)
