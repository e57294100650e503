"""What a trainer surrounds a loss with: a compiler, checkpoints of activations, trackers of modules."""

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gradbank
from gradbank import distances, losses, miners, regularizers

COMPILED = """
import torch
from torch import nn

from gradbank import losses

torch.manual_seed(0)
x, labels, model = torch.randn(12, 8), torch.arange(12) % 4, nn.Linear(8, 8)
made = [
    losses.NTXentLoss(),
    losses.TripletMarginLoss(),
    losses.ArcFaceLoss(4, 8),
    losses.CrossBatchMemory(losses.ContrastiveLoss(), 8, memory_size=16),
    losses.MultipleLosses([losses.NTXentLoss(), losses.MultiSimilarityLoss()]),
]
for loss_fn in made:
    torch._dynamo.reset()
    wanted = loss_fn(model(x), labels) * 2
    (of_weight,) = torch.autograd.grad(wanted, model.weight)
    if hasattr(loss_fn, "reset_queue"):
        loss_fn.reset_queue()
    for step in (torch.compile(lambda x: loss_fn(model(x), labels) * 2, backend="aot_eager"),):
        model.zero_grad()
        found = step(x)
        found.backward()
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(model.weight.grad, of_weight)
    if hasattr(loss_fn, "reset_queue"):
        loss_fn.reset_queue()
    torch.testing.assert_close(torch.compile(loss_fn, backend="eager")(model(x), labels) * 2, wanted)
    if hasattr(loss_fn, "reset_queue"):
        loss_fn.reset_queue()
    loss_fn.compile(backend="eager")
    torch.testing.assert_close(loss_fn(model(x), labels) * 2, wanted)
print("as they were")
"""


def test_a_compiler_leaves_a_loss_alone() -> None:
    """In a process of its own: a compiler that is loaded stays."""
    made = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=240)
    assert made.stdout == "as they were\n", made.stderr


@pytest.mark.parametrize("size", [16, 600])  # held whole, and in tiles
def test_a_checkpointed_model_runs_again_only_for_its_backward_pass(size: int) -> None:
    calls, model, labels, loss_fn = [0], nn.Linear(8, 8), torch.arange(size) // 4, losses.NTXentLoss()
    x = torch.randn(size, 8)

    def step(x: torch.Tensor) -> Any:
        calls[0] += 1
        return loss_fn(model(x), labels)

    wanted = torch.autograd.grad(step(x), model.weight)
    calls[0] = 0
    loss = checkpoint(step, x, use_reentrant=False)
    assert calls == [1]
    assert torch.autograd.grad(loss, model.weight)[0].equal(wanted[0])
    assert calls == [2]


class Watched(distances.CosineSimilarity):
    """Looks at something that is not part of the loss."""

    def compute_mat(self, query_emb: torch.Tensor, ref_emb: torch.Tensor) -> torch.Tensor:
        made = query_emb @ ref_emb.T
        self.mean = made.exp().mean().item()
        return made


def test_a_checkpoint_keeps_nothing_of_a_loss() -> None:
    """Of what an operation saves of its own output, a hook that gives it back would lead to itself."""
    loss_fn, model, labels = losses.NTXentLoss(distance=Watched()), nn.Linear(8, 8), torch.arange(500) // 4
    held: list[int] = []
    for _ in range(12):
        checkpoint(lambda x: loss_fn(model(x), labels), torch.randn(500, 8), use_reentrant=False).backward()
        gc.collect()
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert held[-1] - held[3] < 8 * 2**20  # a matrix has 1 MiB, and two were kept of each call


def test_a_checkpointed_loss_in_the_same_process_is_asked_again() -> None:
    x, labels, here = torch.randn(16, 8, requires_grad=True), torch.arange(16) // 4, losses.NTXentLoss()
    (wanted,) = torch.autograd.grad(here(x, labels), x)
    with gradbank.connect("local://") as client:
        loss = checkpoint(client.open("checkpointed", losses.NTXentLoss()), x, labels, use_reentrant=False)
        assert torch.autograd.grad(loss, x)[0].equal(wanted)


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.NTXentLoss(embedding_regularizer=regularizers.LpRegularizer()),
        lambda: losses.MultipleLosses([losses.NTXentLoss(), losses.TripletMarginLoss()]),
        lambda: losses.CrossBatchMemory(losses.TripletMarginLoss(), 8, memory_size=16, miner=miners.BatchHardMiner()),
    ],
)
def test_modules_within_a_loss_can_be_tracked(make: Callable[[], nn.Module]) -> None:
    x, labels = torch.randn(16, 8, requires_grad=True), torch.arange(16) // 4
    (wanted,) = torch.autograd.grad(make()(x, labels), x)
    with FlopCounterMode(display=False):
        make()(x, labels).backward()  # type: ignore[no-untyped-call]  # torch's
    assert x.grad is not None
    assert x.grad.equal(wanted)


COMPILED_BACKWARD = """
import torch
from torch import nn

from gradbank import losses

torch._dynamo.config.compiled_autograd = True
torch.manual_seed(0)
x, labels, model = torch.randn(12, 8), torch.arange(12) % 4, nn.Linear(8, 8)
for loss_fn in (losses.NTXentLoss(), losses.TripletMarginLoss(), losses.ArcFaceLoss(4, 8)):
    torch._dynamo.reset()
    (wanted,) = torch.autograd.grad(loss_fn(model(x), labels), model.weight)

    @torch.compile(backend="eager")
    def step():
        loss = loss_fn(model(x), labels)
        loss.backward()

    model.zero_grad()
    step()
    torch.testing.assert_close(model.weight.grad, wanted)
print("as they were")
"""


def test_a_compiled_backward_pass_is_that_of_the_loss() -> None:
    """In a process of its own: a compiler that is loaded stays."""
    made = subprocess.run([sys.executable, "-c", COMPILED_BACKWARD], capture_output=True, text=True, timeout=240)
    assert made.stdout == "as they were\n", made.stderr
