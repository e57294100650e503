"""Weights on a server are stepped as they would be here, whatever a loop does to losses, gradients and options."""

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank_server.service import Server

from .conftest import data, head


def adversary(loss_fn: Any, optimizer: Any) -> None:
    (rows, labels), *_ = data()
    leaf = rows.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_fn(leaf, labels), leaf)
    loss_fn(rows + 0.1 * gradient.sign(), labels).backward()


def asked_twice(loss_fn: Any, optimizer: Any) -> None:
    (rows, labels), *_ = data()
    leaf = rows.clone().requires_grad_()
    loss = loss_fn(leaf, labels)
    torch.autograd.grad(loss, leaf, retain_graph=True)
    loss.backward()


def of_the_rows_alone(loss_fn: Any, optimizer: Any) -> None:
    (rows, labels), (others, _), *_ = data()
    leaf = rows.clone().requires_grad_()
    loss_fn(leaf, labels).backward(inputs=[leaf])
    loss_fn(others, labels).backward()


def toggled(loss_fn: Any, optimizer: Any) -> None:
    (rows, labels), (others, _), *_ = data()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for weight in weights:
        weight.requires_grad_(False)
    loss_fn(rows.clone().requires_grad_(), labels).backward()
    for weight in weights:
        weight.requires_grad_(True)
    loss_fn(others, labels).backward()


def reversed_in_between(loss_fn: Any, optimizer: Any) -> None:
    for scale, (rows, labels) in zip((1, -1, 1), data(), strict=False):
        (scale * loss_fn(rows, labels)).backward()


def that_cancel(loss_fn: Any, optimizer: Any) -> None:
    first, second, third = (loss_fn(*batch) for batch in data()[:3])
    (0.1 * first + 0.2 * second - 0.3 * third).backward()


def of_all_sizes(loss_fn: Any, optimizer: Any) -> None:
    first, second, third = (loss_fn(*batch) for batch in data()[:3])
    (1e3 * first - 1e3 * second + 1e-3 * third).backward()


@pytest.mark.parametrize(
    "backward", [adversary, asked_twice, of_the_rows_alone, toggled, reversed_in_between, that_cancel, of_all_sizes]
)
def test_weights_get_what_they_would_get_here_of_passes(
    client: gradbank.Client, name: str, backward: Callable[[Any, Any], None]
) -> None:
    here, there = head(), client.open(name, head())
    for loss_fn, optimizer in (
        (here, torch.optim.SGD(here.parameters(), lr=0.01)),
        (there, there.optimizer("SGD", lr=0.01)),
    ):
        backward(loss_fn, optimizer)
        optimizer.step()
    assert not torch.equal(here.W, head().W)
    torch.testing.assert_close(there.local().W, here.W)


def once(loss_fn: Any, optimizer: Any) -> None:
    loss_fn(*data()[0]).backward()
    optimizer.step()


def zeroed_by_the_loss(loss_fn: Any, optimizer: Any) -> None:
    for batch in data()[:2]:
        loss_fn.zero_grad()
        loss_fn(*batch).backward()
        optimizer.step()


def reloaded(loss_fn: Any, optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())
    once(loss_fn, optimizer)


def carried_on_by_momentum(loss_fn: Any, optimizer: Any) -> None:
    once(loss_fn, optimizer)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    once(loss_fn, optimizer)


def zeroed_by_hand(loss_fn: Any, optimizer: Any) -> None:
    once(loss_fn, optimizer)
    optimizer.param_groups[0]["params"][0].grad.zero_()
    rows, labels = data()[1]
    leaf = rows.clone().requires_grad_()
    torch.autograd.grad(loss_fn(leaf, labels), leaf)
    optimizer.step()


def before_autocast(loss_fn: Any, optimizer: Any) -> None:
    once(loss_fn, optimizer)
    with torch.autocast("cpu"):
        loss_fn(*data()[1])


def halved_in_between(loss_fn: Any, optimizer: Any) -> None:
    for batch, factor in zip(data(), (0.5, 0.25, 1.0), strict=False):
        loss_fn(*batch).backward()
        optimizer.param_groups[0]["params"][0].grad.mul_(factor)
    optimizer.step()


def one_within_another(loss_fn: Any, optimizer: Any) -> None:
    (first, labels), (second, _), (third, _), *_ = data()
    within, leaf = loss_fn(first, labels), second.clone().requires_grad_()
    leaf.register_hook(lambda gradient: within.backward())
    (loss_fn(leaf, labels) + loss_fn(third, labels)).backward()
    optimizer.step()


def one_within_another_from_zero(loss_fn: Any, optimizer: Any) -> None:
    once(loss_fn, optimizer)
    optimizer.zero_grad(set_to_none=False)
    one_within_another(loss_fn, optimizer)


def past_an_overflow(loss_fn: Any, optimizer: Any) -> None:
    for batch, scale in zip(data(), (1024.0, math.inf, 1024.0, 1024.0), strict=False):
        optimizer.zero_grad(set_to_none=False)
        (scale * loss_fn(*batch)).backward()
        gradient = optimizer.param_groups[0]["params"][0].grad
        if gradient.isfinite().all():
            gradient.div_(scale)
            optimizer.step()


def turned_in_between(loss_fn: Any, optimizer: Any) -> None:
    loss_fn(*data()[0]).backward()
    optimizer.param_groups[0]["params"][0].grad.neg_()
    once_more = data()[1]
    loss_fn(*once_more).backward()
    optimizer.step()


def with_an_option_of_two(loss_fn: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["eps"] = (None, 100.0)
    once(loss_fn, optimizer)


def with_an_option_of_words(loss_fn: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["adjust_lr_fn"] = "match_rms_adamw"
    once(loss_fn, optimizer)


@pytest.mark.parametrize(
    ("loop", "kind", "options", "loss"),
    [
        (once, "SGD", {"lr": 0.1, "fused": True}, losses.LargeMarginSoftmaxLoss),
        (once, "Adam", {"lr": 0.1, "fused": True}, losses.LargeMarginSoftmaxLoss),
        (zeroed_by_the_loss, "SGD", {"lr": 0.1}, losses.CosFaceLoss),
        (reloaded, "Muon", {}, losses.CosFaceLoss),
        (reloaded, "Adafactor", {}, losses.CosFaceLoss),
        (carried_on_by_momentum, "SGD", {"lr": 0.1, "momentum": 0.9}, losses.CosFaceLoss),
        (zeroed_by_hand, "SGD", {"lr": 0.1, "momentum": 0.9}, losses.CosFaceLoss),
        (before_autocast, "Adafactor", {"lr": 0.1}, losses.ProxyAnchorLoss),
        (halved_in_between, "SGD", {"lr": 0.1}, losses.CosFaceLoss),
        (one_within_another, "SGD", {"lr": 0.1}, losses.CosFaceLoss),
        (one_within_another_from_zero, "SGD", {"lr": 0.1}, losses.CosFaceLoss),
        (past_an_overflow, "SGD", {"lr": 0.1, "momentum": 0.9}, losses.CosFaceLoss),
        (turned_in_between, "SGD", {"lr": 0.1}, losses.CosFaceLoss),
        (with_an_option_of_two, "Adafactor", {"lr": 0.1}, losses.CosFaceLoss),
        (with_an_option_of_words, "Muon", {}, losses.CosFaceLoss),
    ],
)
@pytest.mark.parametrize("way", ["tcp", "local"])
def test_an_optimizer_does_there_what_it_would_do_here(
    server: Server, name: str, way: str, loop: Callable[[Any, Any], None], kind: str, options: dict[str, Any], loss: Any
) -> None:
    torch.manual_seed(0)
    here = loss(4, 8)
    first = here.rebuilt()
    first.load_state_dict(here.state_dict())
    with gradbank.connect(server.address if way == "tcp" else "local://") as client:
        there = client.open(name, first)
        loop(here, getattr(torch.optim, kind)(here.parameters(), **options))
        loop(there, there.optimizer(kind, **options))
        for found, wanted, before in zip(
            there.local().parameters(), here.parameters(), first.parameters(), strict=True
        ):
            assert not torch.equal(found, before)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_several_backward_passes_at_once_are_refused_where_weights_are_learned(
    client: gradbank.Client, name: str
) -> None:
    there = client.open(name, head())
    there.optimizer("SGD", lr=0.1)
    rows, labels = data()[0]
    leaf = rows.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="one backward pass at a time: leave is_grads_batched out"):
        torch.autograd.grad(there(leaf, labels), leaf, torch.ones(2), is_grads_batched=True)


def test_an_optimizer_that_nobody_has_is_freed(client: gradbank.Client, name: str) -> None:
    there = client.open(name, head())
    held = weakref.ref(there.optimizer("SGD", lr=0.1))
    there(*data()[0]).backward()
    client.close_session(name)
    there.close()
    client._open.clear()
    del there
    gc.collect()
    assert held() is None
