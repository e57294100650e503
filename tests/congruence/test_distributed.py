"""Ranks: those that gather their batches get what PML's wrapper gives, and torch's wrappers train what is within."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.utils import distributed
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from gradbank import losses


def gathered(own: Tensor) -> list[Tensor]:
    """The tensors of all ranks, without gradients."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.detach())
    return parts


class Model(nn.Module):
    """A network and its loss in one, as a wrapper takes them."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = nn.Linear(16, 16, bias=False), loss

    def forward(self, batch: Tensor, labels: Tensor) -> Any:
        return self.loss(self.net(batch), labels)


def run(rank: int, work: Any, folder: Path) -> None:
    """One rank's process, which writes what `work` gives."""
    torch.set_num_threads(1)
    begun = f"file://{folder}/ranks"
    dist.init_process_group("gloo", init_method=begun, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


def ranks(work: Any, folder: Path) -> list[Any]:
    """What `work(rank)` gives in two processes."""
    words = [sys.executable, "-W", "ignore", __file__, work.__name__, str(folder)]
    running = [subprocess.Popen([*words, str(rank)]) for rank in range(2)]
    try:
        assert [each.wait(90) for each in running] == [0, 0]
    finally:
        for each in running:
            each.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def gathering(rank: int) -> Any:
    """The loss and its gradient, by PML's wrapper and by ours."""
    torch.manual_seed(rank)
    batch, labels = torch.randn(8, 16), torch.arange(8) // 2
    wrapped = distributed.DistributedLossWrapper(pml_losses.NTXentLoss())
    embeddings = batch.clone().requires_grad_()
    theirs = wrapped(embeddings, labels)
    (of_theirs,) = torch.autograd.grad(theirs, embeddings)
    embeddings = batch.clone().requires_grad_()
    parts = gathered(embeddings)
    parts[rank] = embeddings
    ours = losses.NTXentLoss()(torch.cat(parts), torch.cat(gathered(labels))) * len(parts)
    (of_ours,) = torch.autograd.grad(ours, embeddings)
    return (ours.detach(), of_ours), (theirs.detach(), of_theirs)


def test_gathered_batches_make_the_loss_of_all_ranks(tmp_path: Path) -> None:
    for ours, theirs in ranks(gathering, tmp_path):
        torch.testing.assert_close(ours, theirs)


def batches(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(8, 16, generator=generator) for _ in range(4)]


def queueing(rank: int) -> Any:
    torch.manual_seed(0)
    model = DistributedDataParallel(Model(losses.CrossBatchMemory(losses.NTXentLoss(), 16, 20)))
    made = []
    for batch in batches(rank):
        made.append(model(batch, torch.arange(8) // 4))
        made[-1].backward()
        if rank == 0:
            model.state_dict()  # as it is saved, which has the queue written
    return torch.stack(made).detach()


def test_each_rank_has_a_queue_of_its_own(tmp_path: Path) -> None:
    for rank, found in enumerate(ranks(queueing, tmp_path)):
        torch.manual_seed(0)
        alone = Model(losses.CrossBatchMemory(losses.NTXentLoss(), 16, 20))
        wanted = torch.stack([alone(batch, torch.arange(8) // 4) for batch in batches(rank)])
        torch.testing.assert_close(found, wanted.detach())


def sharding(rank: int) -> Any:
    made = []
    for library in (losses, pml_losses):
        torch.manual_seed(0)
        model = FullyShardedDataParallel(Model(library.ArcFaceLoss(4, 16)), device_id=torch.device("cpu"))
        model(batches(rank)[0], torch.arange(8) // 2).backward()
        made.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
    return made


def test_class_weights_are_trained_in_shards(tmp_path: Path) -> None:
    for ours, theirs in ranks(sharding, tmp_path):
        torch.testing.assert_close(ours, theirs)
        assert bool(ours.any())


if __name__ == "__main__":
    run(int(sys.argv[3]), globals()[sys.argv[1]], Path(sys.argv[2]))
    os._exit(0)  # threads of gloo may still be there, and end the process otherwise
