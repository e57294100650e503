"""The optimizer of a hosted loss in the hands of others: frameworks that wrap it, and loops that clear gradients."""

import subprocess
import sys
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

from .conftest import data, head

Optimizer = torch.optim.Optimizer


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
