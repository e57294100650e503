"""Three computations of one loss: PML's, gradbank's here, and gradbank's on a server."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank

ROUNDING = torch.finfo(torch.float32).eps  # below that, whose error is smaller is chance


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm()) / (float(wanted.double().norm()) + 1e-300)


def agrees(found: Tensor, wanted: Tensor) -> bool:
    return relative(found, wanted) < 1e-9 or float((found - wanted).norm()) < 1e-13


def test_remote_equals_local_bit_for_bit(case: Any, batches: Any, host: gradbank.Client, name: str) -> None:
    drawn = batches(1, torch.float32)
    remote = host.open(name, case.ours())
    for here, there in zip(case.answers(case.ours(), drawn), case.answers(remote, drawn), strict=True):
        assert torch.equal(there.value, here.value)
        assert torch.equal(there.gradient, here.gradient)


def test_remote_equals_local_bit_for_bit_in_float64(case: Any, batches: Any, client: gradbank.Client, name: str) -> None:
    drawn = batches(2, torch.float64, steps=8)
    remote = client.open(name, case.ours())
    for here, there in zip(case.answers(case.ours(), drawn), case.answers(remote, drawn), strict=True):
        assert there.value.dtype == torch.float64
        assert torch.equal(there.value, here.value)
        assert torch.equal(there.gradient, here.gradient)


def test_local_equals_pml_to_nine_digits(case: Any, batches: Any) -> None:
    drawn = batches(3, torch.float64)
    ours, theirs = case.ours(), case.theirs()
    for mine, pml in zip(case.answers(ours, drawn), case.answers(theirs, drawn), strict=True):
        assert agrees(mine.value, pml.value)
        assert agrees(mine.gradient, pml.gradient)


def test_float32_error_is_at_most_twice_that_of_pml(case: Any, batches: Any) -> None:
    errors = {"ours": [0.0, 0.0], "theirs": [0.0, 0.0]}  # of values and of gradients, squared and added up
    answers = 0
    for seed in range(4, 10):
        drawn = batches(seed, torch.float32)
        truth = case.answers(case.theirs().double(), [(embeddings.double(), labels) for embeddings, labels in drawn])
        for who, loss in (("ours", case.ours()), ("theirs", case.theirs())):
            for found, wanted in zip(case.answers(loss, drawn), truth, strict=True):
                assert found.value.dtype == found.gradient.dtype == torch.float32
                if wanted.value:
                    errors[who][0] += relative(found.value, wanted.value) ** 2
                if wanted.gradient.any():
                    errors[who][1] += relative(found.gradient, wanted.gradient) ** 2
        answers += len(truth)
    for mine, pml in zip(errors["ours"], errors["theirs"], strict=True):
        assert math.sqrt(mine / answers) <= 2 * math.sqrt(pml / answers) + ROUNDING


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
