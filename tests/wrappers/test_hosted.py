"""Wrapped losses on a server: the same numbers as here."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import losses, miners
from gradbank.wrappers import CrossBatchMemory, MultipleLosses, SelfSupervisedLoss

Made = Callable[[], losses.Loss]

BATCH, D = 12, 6


def named() -> losses.Loss:
    return MultipleLosses(
        {"pairs": losses.ContrastiveLoss(), "softmax": losses.NTXentLoss(0.5)},
        miners={"softmax": miners.MultiSimilarityMiner()},
        weights={"pairs": 1, "softmax": 0.25},
    )


def listed() -> losses.Loss:
    return MultipleLosses([losses.TripletMarginLoss(), losses.SupConLoss()], [None, miners.MultiSimilarityMiner()])


def with_banks() -> losses.Loss:
    return MultipleLosses([CrossBatchMemory(losses.NTXentLoss(), D, 30), losses.ContrastiveLoss()], weights=[0.5, 2])


def answers(loss: Any, **rest: Any) -> list[Tensor]:
    torch.manual_seed(0)
    leaf, labels = torch.randn(BATCH, D, requires_grad=True), torch.randint(4, (BATCH,))
    value = loss(leaf, **(rest or {"labels": labels}))
    value.backward()
    assert leaf.grad is not None
    return [value.detach(), leaf.grad]


@pytest.mark.parametrize("make", [named, listed, with_banks])
def test_several_losses_are_hosted(make: Made, embedded: gradbank.Client, name: str) -> None:
    here, there = make(), embedded.open(name, make())
    for _ in range(4):
        assert all(map(torch.equal, answers(here), answers(there)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_two_views_are_hosted(symmetric: bool, embedded: gradbank.Client, name: str) -> None:
    made = [SelfSupervisedLoss(losses.NTXentLoss(), symmetric) for _ in range(2)]
    here, there = made[0], embedded.open(name, made[1])
    gradients = []
    for loss in (here, there):
        view = torch.ones(BATCH, D).cumsum(0).sin().requires_grad_()
        gradients.append([*answers(loss, ref_emb=view), view.grad])
    assert all(map(torch.equal, *gradients))


def test_vicreg_is_hosted(embedded: gradbank.Client, name: str) -> None:
    view = torch.ones(BATCH, D).cumsum(0).sin()
    there = embedded.open(name, losses.VICRegLoss(covariance_v=2))
    assert all(map(torch.equal, answers(losses.VICRegLoss(covariance_v=2), ref_emb=view), answers(there, ref_emb=view)))


def test_p2sgrad_is_hosted(embedded: gradbank.Client, name: str) -> None:
    here = losses.P2SGradLoss(D, 4)
    there = embedded.open(name, here)
    assert all(map(torch.equal, answers(here), answers(there)))


def test_manifold_is_hosted(embedded: gradbank.Client, name: str) -> None:
    here = losses.ManifoldLoss(D, 4)
    there, own = embedded.open(name, here), (torch.arange(BATCH) % 4,)
    assert all(map(torch.equal, answers(here, indices_tuple=own), answers(there, indices_tuple=own)))
