"""Three computations of one loss: PML's, gradbank's here, and gradbank's on a server."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import engine, losses

PAIR_LOSSES = ("ContrastiveLoss", "MultiSimilarityLoss", "NTXentLoss", "SupConLoss", "TripletMarginLoss")
ROUNDING = torch.finfo(torch.float32).eps  # below that, whose error is smaller is chance


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm()) / (float(wanted.double().norm()) + 1e-300)


def agrees(found: Tensor, wanted: Tensor) -> bool:
    return relative(found, wanted) < 1e-9 or float((found - wanted).norm()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_remote_equals_local_bit_for_bit(
    case: Any, batches: Any, dtype: torch.dtype, host: gradbank.Client, name: str
) -> None:
    drawn = batches(1, dtype)
    remote = host.open(name, case.ours())
    for here, there in zip(case.answers(case.ours(), drawn), case.answers(remote, drawn), strict=True):
        assert there.value.dtype == there.gradient.dtype == dtype
        assert torch.equal(there.value, here.value)
        assert torch.equal(there.gradient, here.gradient)


@pytest.mark.parametrize("engine_name", ["dense", "tiled"])
def test_local_equals_pml_to_nine_digits(case: Any, batches: Any, engine_name: str) -> None:
    drawn = batches(3, torch.float64)
    with engine.using(engine_name):
        ours = case.answers(case.ours(), drawn)
    for mine, pml in zip(ours, case.answers(case.theirs(), drawn), strict=True):
        assert agrees(mine.value, pml.value)
        assert agrees(mine.gradient, pml.gradient)


@pytest.mark.parametrize("engine_name", ["dense", "tiled"])
def test_float32_error_is_at_most_twice_that_of_pml(case: Any, batches: Any, engine_name: str) -> None:
    errors = {"ours": [0.0, 0.0], "theirs": [0.0, 0.0]}  # of values and of gradients, squared and added up
    number = 0
    for seed in range(4, 10):
        drawn = batches(seed, torch.float32)
        truth = case.answers(case.theirs().double(), [(embeddings.double(), labels) for embeddings, labels in drawn])
        for who, loss in (("ours", case.ours()), ("theirs", case.theirs())):
            with engine.using(engine_name):
                answers = case.answers(loss, drawn)
            for found, wanted in zip(answers, truth, strict=True):
                assert found.value.dtype == found.gradient.dtype == torch.float32
                if wanted.value:
                    errors[who][0] += relative(found.value, wanted.value) ** 2
                if wanted.gradient.any():
                    errors[who][1] += relative(found.gradient, wanted.gradient) ** 2
        number += len(truth)
    for mine, pml in zip(errors["ours"], errors["theirs"], strict=True):
        assert math.sqrt(mine / number) <= 2 * math.sqrt(pml / number) + ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bank_ends_as_that_of_pml(bank: Any, batches: Any, dtype: torch.dtype) -> None:
    ours, theirs = bank.ours(), bank.theirs()
    for queue in (ours, theirs):
        bank.answers(queue, batches(5, dtype))
    assert torch.equal(ours.embedding_memory, theirs.embedding_memory)
    assert torch.equal(ours.label_memory, theirs.label_memory)
    assert (ours.queue_idx, ours.has_been_filled) == (theirs.queue_idx, theirs.has_been_filled)


def test_pulled_copy_goes_on_where_the_server_is(case: Any, batches: Any, host: gradbank.Client, name: str) -> None:
    drawn = batches(6, torch.float32, steps=8)
    remote = host.open(name, case.ours())
    case.answers(remote, drawn[:7])
    copy = remote.local()
    for here, there in zip(case.answers(copy, drawn[7:]), case.answers(remote, drawn[7:]), strict=True):
        assert torch.equal(there.value, here.value)
        assert torch.equal(there.gradient, here.gradient)


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_remote_equals_local_for_a_matrix_beyond_a_tile(loss: str, host: gradbank.Client, name: str) -> None:
    """300 anchors against 2500 rows are more than a tile: both sides choose the tiled engine by size."""
    torch.manual_seed(7)
    here = losses.CrossBatchMemory(getattr(losses, loss)(), 16, 2500)
    assert engine.Bounds().tile < 300 * 2500
    here.add_to_memory(torch.randn(2400, 16), torch.randint(50, (2400,)))
    remote = host.open(name, here)
    for _ in range(3):
        embeddings, labels = torch.randn(300, 16), torch.randint(50, (300,))
        gradients = []
        for compared in (here, remote):
            leaf = embeddings.clone().requires_grad_()
            value = compared(leaf, labels)
            value.backward()
            gradients += [value.detach(), leaf.grad]
        assert torch.equal(gradients[0], gradients[2])
        assert torch.equal(gradients[1], gradients[3])
