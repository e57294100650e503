"""A queue among threads, checkpoints of activations and of ranks, and lists of rows of any kind."""

import copy
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gradbank import losses

D = 6


def batch(seed: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)), torch.arange(rows) // 2


def queue(size: int = 32) -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(), D, size)


def test_threads_that_share_a_queue_enter_all_their_rows() -> None:
    """Whichever way each of them comes to it."""
    made, numbers = queue(4096), iter(range(1000))

    def steps(loss_fn: Any) -> None:
        for _ in range(20):
            rows, _ = batch(0)
            loss_fn(rows, torch.full((8,), next(numbers)))

    ways = (made, made, losses.MultipleLosses([made]), losses.MultipleLosses([made, losses.NTXentLoss()]))
    threads = [threading.Thread(target=steps, args=(each,)) for each in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4 * 20 * 8
    assert sorted(made.label_memory[: len(made)].tolist()) == sorted(list(range(80)) * 8)


def test_a_checkpoint_of_activations_has_the_gradient_of_the_loss_that_it_gave() -> None:
    def gradient(around: bool) -> tuple[Tensor, Tensor, int]:
        made, model = queue(), nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        torch.manual_seed(0)
        for layer in model.parameters():
            nn.init.normal_(layer)
        rows, labels = batch(1)

        def step(rows: Tensor) -> Tensor:
            loss: Tensor = made(model(rows), labels)
            return loss

        value = checkpoint(step, rows, use_reentrant=False) if around else step(rows)
        value.backward()
        return value.detach(), model[0].weight.grad, len(made)

    (value, found, rows), (plain, wanted, all_rows) = gradient(True), gradient(False)
    assert torch.equal(value, plain)
    torch.testing.assert_close(found, wanted)
    assert rows == all_rows == 8


def test_a_second_backward_pass_is_refused_in_the_words_of_torch() -> None:
    rows, labels = batch(2)
    for made in (queue(), losses.TripletMarginLoss(), losses.ArcFaceLoss(4, D)):
        value = made(rows.requires_grad_(), labels)
        value.backward(retain_graph=True)
        value.backward()
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            value.backward()


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (3, r"enqueue_idx must be \(K,\) integers, got \(\) torch.int64"),
        (torch.tensor([0.0, 2.0]), r"enqueue_idx must be \(K,\) integers, got \(2,\) torch.float32"),
        (torch.tensor([[0, 2]]), r"got \(1, 2\) torch.int64"),
        (torch.zeros(8, dtype=torch.bool), r"got \(8,\) torch.bool: a mask is given as enqueue_mask"),
        (torch.tensor([0, 8]), r"enqueue_idx names rows 0 to 8, but must stay within 0\.\.7"),
    ],
    ids=["a number", "floats", "a matrix", "a mask", "too far"],
)
def test_rows_to_enter_are_a_list_of_integers(positions: Any, message: str) -> None:
    made = queue()
    with pytest.raises(ValueError, match=message):
        made(*batch(3), enqueue_idx=positions)
    assert len(made) == 0


@pytest.mark.parametrize(
    "positions",
    [[0, 2], torch.tensor([0, 2], dtype=torch.int16), torch.tensor([0, 2], dtype=torch.uint8)],
    ids=["a list", "int16", "uint8"],
)
def test_rows_to_enter_may_be_integers_of_any_kind(positions: Any) -> None:
    one, other = queue(), queue()
    assert torch.equal(one(*batch(3), enqueue_idx=positions), other(*batch(3), enqueue_idx=torch.tensor([0, 2])))
    assert len(one) == 2
    for none in ([], torch.tensor([])):
        one(*batch(3), enqueue_idx=none)
    assert len(one) == 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.loss = nn.Linear(D, D), queue()

    def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.net(rows), labels)
        return loss


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one rank."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_distributed_checkpoint_restores_a_queue_within_a_wrapped_model() -> None:
    model = DistributedDataParallel(Model())
    model(*batch(4))
    saved = {key: value.clone() for key, value in get_model_state_dict(model).items()}
    other = DistributedDataParallel(Model())
    set_model_state_dict(other, copy.deepcopy(saved))
    assert len(other.module.loss) == 8
    for key, value in get_model_state_dict(other).items():
        assert torch.equal(value, saved[key]), key
    assert not any("memory" in name for name, _ in model.named_buffers())  # which ranks would average or broadcast
