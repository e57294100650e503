"""Ranks that gather their batches, as docs/losses.md has it, get what PML's wrapper of losses gives."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.utils import distributed
from torch import Tensor

from gradbank import losses


def gathered(own: Tensor) -> list[Tensor]:
    """The tensors of all ranks, without gradients."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.detach())
    return parts


def step(rank: int, folder: Path) -> None:
    """Of one rank: writes its loss and its gradient, by PML's wrapper and by ours."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    torch.manual_seed(rank)
    batch, labels = torch.randn(8, 16), torch.arange(8) // 2
    made: list[Any] = []
    wrapped = distributed.DistributedLossWrapper(pml_losses.NTXentLoss())
    embeddings = batch.clone().requires_grad_()
    loss = wrapped(embeddings, labels)
    made += [loss.detach(), *torch.autograd.grad(loss, embeddings)]
    embeddings = batch.clone().requires_grad_()
    parts = gathered(embeddings)
    parts[rank] = embeddings
    loss = losses.NTXentLoss()(torch.cat(parts), torch.cat(gathered(labels))) * len(parts)
    made += [loss.detach(), *torch.autograd.grad(loss, embeddings)]
    torch.save(made, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_gathered_batches_make_the_loss_of_all_ranks(tmp_path: Path) -> None:
    mp.spawn(step, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]  # torch's
    for rank in range(2):
        theirs, of_theirs, ours, of_ours = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(of_ours, of_theirs)
