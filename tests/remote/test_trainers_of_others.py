"""The optimizer of a hosted loss in the hands of others: frameworks that wrap it, and loops that clear gradients."""

import gc
import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradbank
from gradbank import losses
from gradbank.errors import InvalidRequest
from gradbank_server.service import Server

Optimizer = torch.optim.Optimizer


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 8, generator=generator), torch.arange(12) % 4) for _ in range(6)]


def head() -> losses.ArcFaceLoss:
    torch.manual_seed(0)
    return losses.ArcFaceLoss(4, 8, scale=8)


def trained(loss_fn: nn.Module, optimizer: Any, loop: Callable[[Any, Any, Tensor, Tensor], Tensor]) -> list[float]:
    return [loop(loss_fn, optimizer, *batch).item() for batch in data()]


def plainly(loss_fn: Any, optimizer: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss: Tensor = loss_fn(embeddings, labels)
    loss.backward()
    optimizer.step()
    return loss


def by_closure(loss_fn: Any, optimizer: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_fn(embeddings, labels)
        loss.backward()
        return loss

    with torch.no_grad():  # as frameworks call it
        made: Tensor = optimizer.step(closure)
    return made


def dropping(loss_fn: Any, optimizer: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = None
    loss: Tensor = loss_fn(embeddings, labels)
    loss.backward()
    optimizer.step()
    return loss


def zeroing(loss_fn: Any, optimizer: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                weight.grad.zero_()
    loss: Tensor = loss_fn(embeddings, labels)
    (loss_fn(embeddings, labels) * 0.5 + loss * 2).backward()
    optimizer.step()
    return loss


def as_fabric_does(optimizer: Optimizer) -> Any:
    """Lightning's: a class written on the optimizer's, with a copy of most of what that has."""

    class Wrapper(type(optimizer)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("state_dict", "step")}

        def step(self, closure: Any = None) -> Any:
            return optimizer.step() if closure is None else optimizer.step(closure=closure)

        def __getattr__(self, name: str) -> Any:
            return getattr(optimizer, name)

    return Wrapper()


@pytest.mark.parametrize("loop", [plainly, by_closure, dropping, zeroing])
@pytest.mark.parametrize("wrapped", [lambda optimizer: optimizer, as_fabric_does], ids=["bare", "wrapped"])
def test_weights_are_trained_as_in_this_process(
    client: gradbank.Client, name: str, loop: Callable[..., Tensor], wrapped: Callable[[Optimizer], Any]
) -> None:
    here = head()
    wanted = trained(here, torch.optim.SGD(here.parameters(), lr=0.5), loop)
    there = client.open(name, head())
    found = trained(there, wrapped(there.optimizer("SGD", lr=0.5)), loop)
    assert found == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(there.local().W, here.W)


@pytest.mark.parametrize("made", [float, np.float32, np.float64, torch.tensor], ids=lambda made: made.__name__)
def test_a_learning_rate_is_a_number_whoever_made_it(client: gradbank.Client, name: str, made: Any) -> None:
    def scheduled(loss_fn: Any, optimizer: Any) -> list[float]:
        values = []
        for i, batch in enumerate(data()):
            optimizer.param_groups[0]["lr"] = made(0.5 / (i + 1))
            values.append(plainly(loss_fn, optimizer, *batch).item())
        return values

    here = head()
    wanted = scheduled(here, torch.optim.SGD(here.parameters(), lr=0.001))
    there = client.open(name, head())
    assert scheduled(there, there.optimizer("SGD", lr=0.001)) == pytest.approx(wanted, rel=1e-6)
    assert there.local().W.detach().flatten().tolist() == pytest.approx(here.W.detach().flatten().tolist(), rel=1e-5)


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


def test_what_is_the_servers_cannot_be_set_here(client: gradbank.Client, name: str) -> None:
    there = client.open(name, losses.CrossBatchMemory(losses.NTXentLoss(), 8, memory_size=16))
    for each, value in (("memory_size", 4), ("loss", None), ("embedding_memory", torch.zeros(16, 8))):
        with pytest.raises(AttributeError, match=f"'{each}' of the hosted CrossBatchMemory is the server's"):
            setattr(there, each, value)
    there.note = "mine"
    assert there.note == "mine"
    trains = client.open(f"{name}-head", head())
    with pytest.raises(AttributeError, match="'W' of the hosted ArcFaceLoss"):
        trains.W = nn.Parameter(torch.zeros(8, 4))
    with pytest.raises(InvalidRequest, match="are the server's: freeze them"):
        trains.requires_grad_(False)
    assert trains.requires_grad_() is trains
    assert there.requires_grad_(False) is there


COMPILED = """
import sys

import torch
from torch import nn

import gradbank
from gradbank import losses

torch.manual_seed(0)
embeddings, labels, model = torch.randn(12, 8), torch.arange(12) % 4, nn.Linear(8, 8)
with gradbank.connect(sys.argv[1]) as client:
    there = client.open(sys.argv[2], losses.NTXentLoss())
    wanted = losses.NTXentLoss()(model(embeddings), labels) * 2
    (of_weight,) = torch.autograd.grad(wanted, model.weight)
    step = torch.compile(lambda embeddings, labels: there(model(embeddings), labels) * 2, backend="aot_eager")
    found = step(embeddings, labels)
    found.backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(model.weight.grad, of_weight)
print("as it was")
"""


def test_a_compiled_step_leaves_the_wire_alone(server: Server, name: str) -> None:
    """In a process of its own: a compiler that is loaded stays."""
    words = [sys.executable, "-c", COMPILED, server.address, name]
    made = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert made.stdout == "as it was\n", made.stderr
