"""Odd arguments of a hosted loss: it takes those that the loss takes here, and says what is wrong with others."""

from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gradbank
from gradbank import losses, miners
from gradbank.errors import InvalidRequest

E, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) // 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, Y), "embeddings must be a tensor, got NoneType"),
        ((E, Y, ()), "indices_tuple must be a tuple of tensors, and not an empty one"),
        ((E, Y, 3), "indices_tuple must be a tuple of tensors"),
        ((E.to("meta"), Y), "a tensor of the device meta cannot be sent"),
        ((E.to_sparse(), Y), r"make it dense with to_dense\(\)"),
    ],
    ids=["no embeddings", "no indices", "a number", "meta", "sparse"],
)
def test_what_cannot_be_sent_is_refused_by_name(
    client: gradbank.Client, name: str, arguments: tuple[Any, ...], message: str
) -> None:
    there = client.open(name, losses.TripletMarginLoss())
    with pytest.raises(InvalidRequest, match=message):
        there(*arguments)
    assert client.stats(name).steps == 0


def test_the_name_of_a_session_is_a_string(client: gradbank.Client) -> None:
    with pytest.raises(InvalidRequest, match="the name of a session must be a string, got 5"):
        client.open(5, losses.NTXentLoss())  # type: ignore[arg-type]


def test_embeddings_beyond_float16_are_refused_before_they_are_sent(client: gradbank.Client, name: str) -> None:
    there = client.open(name, losses.NTXentLoss(), wire=torch.float16)
    with pytest.raises(InvalidRequest, match=r"embeddings go up to .*, and float16 to 65504: .*wire=torch.bfloat16"):
        there(E * 1e6, Y)
    assert there(E, Y).isfinite()


@pytest.mark.parametrize(
    "made",
    [lambda e: torch._neg_view(-e), lambda e: e.t().contiguous().t(), lambda e: e[::1].expand(8, 6), nn.Parameter],
    ids=["negated", "transposed", "expanded", "a parameter"],
)
def test_views_of_any_kind_are_what_they_show(client: gradbank.Client, name: str, made: Any) -> None:
    torch.testing.assert_close(client.open(name, losses.NTXentLoss())(made(E), Y), losses.NTXentLoss()(E, Y))


def test_triplets_may_be_stacked_and_labels_unsigned(client: gradbank.Client, name: str) -> None:
    here, there = losses.TripletMarginLoss(), client.open(name, losses.TripletMarginLoss())
    stacked = torch.stack(miners.TripletMarginMiner()(E, Y))  # type: ignore[arg-type]
    assert torch.equal(there(E, Y, stacked), here(E, Y, stacked))
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        assert torch.equal(there(E, Y.to(dtype)), here(E, Y))


def test_an_argument_that_is_a_frozen_parameter_is_hosted_as_its_number(client: gradbank.Client, name: str) -> None:
    here = losses.NTXentLoss(temperature=nn.Parameter(torch.tensor(0.1), requires_grad=False))
    assert torch.equal(client.open(name, here)(E, Y), here(E, Y))


def test_an_argument_that_is_a_parameter_is_converted_as_one() -> None:
    theirs = pml_losses.NTXentLoss(temperature=nn.Parameter(torch.tensor(0.1)))
    ours = gradbank.from_pml(theirs)
    assert ours.temperature is not theirs.temperature
    for loss_fn in (theirs, ours):
        loss_fn(E, Y).backward()
    torch.testing.assert_close(ours.temperature.grad, theirs.temperature.grad)


def test_a_tracker_of_modules_leaves_an_embedded_loss_alone(name: str) -> None:
    rows = E.clone().requires_grad_()
    with gradbank.connect("local://") as client, FlopCounterMode(display=False):
        there = client.open(name, losses.NTXentLoss())
        loss: Tensor = there(rows, Y)
        loss.backward()
    assert rows.grad is not None
