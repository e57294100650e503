"""What a trainer does with a queue that lives on a server, besides stepping."""

import asyncio
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import losses
from gradbank.errors import InvalidRequest

from .conftest import wait_until


def memory() -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(), 16, 64)


def batch(seed: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 16, generator=generator), torch.randint(4, (rows,), generator=generator)


def test_a_queue_is_emptied_and_filled_as_it_is_here(anyway: gradbank.Client, name: str) -> None:
    here, there = memory(), anyway.open(name, memory())
    for each in (here, there):
        each(*batch(0))
        each.reset_queue()
        each.add_to_memory(*batch(1, 20))
    assert anyway.stats(name).bank_rows == 20
    assert torch.equal(here(*batch(2)), there(*batch(2)))
    copy = there.local()
    for each in ("embedding_memory", "label_memory", "queue_idx", "has_been_filled"):
        assert torch.equal(torch.as_tensor(getattr(copy, each)), torch.as_tensor(getattr(here, each)))


def test_it_is_emptied_for_all_ranks_after_what_is_in_flight(anyway: gradbank.Client, name: str) -> None:
    one, other = (anyway.open(name, memory(), rank=rank) for rank in range(2))
    other(*batch(0))
    flying = [one.submit(*batch(seed)) for seed in (1, 2, 3)]
    one.reset_queue()
    assert all(each.result().isfinite() for each in flying)
    assert anyway.stats(name).bank_rows == 0
    fresh = memory()
    assert torch.equal(other(*batch(4)), fresh(*batch(4)))


def test_every_queue_of_several_losses_is_emptied(either: gradbank.Client, name: str) -> None:
    there = either.open(name, losses.MultipleLosses({"a": memory(), "b": losses.NTXentLoss(), "c": memory()}))
    there(*batch(0))
    assert either.stats(name).bank_rows == 16
    there.reset_queue()
    assert either.stats(name).bank_rows == 0


def test_an_answer_that_is_lost_empties_it_once(
    far: gradbank.Client, near: gradbank.Client, proxy: Any, name: str
) -> None:
    loss_fn, other = far.open(name, memory()), near.open(name, memory(), rank=1)
    loss_fn(*batch(0))

    def carried_out() -> bool:
        emptied = near.stats(name).bank_rows == 0
        if emptied:
            other(*batch(1))  # enters before the step is asked for again, and must stay
        return emptied

    proxy.lose_answers_until(carried_out)
    loss_fn.reset_queue()
    wait_until(lambda: proxy.cuts > 0)
    assert near.stats(name).bank_rows == 8
    assert near.stats(name).replayed == 1


def test_a_mask_may_be_an_array(either: gradbank.Client, name: str) -> None:
    here, there = memory(), either.open(name, memory())
    mask = np.arange(8) < 5
    assert torch.equal(there(*batch(0), enqueue_mask=mask), here(*batch(0), enqueue_mask=mask))
    assert either.stats(name).bank_rows == len(here) == 5


def test_a_loss_without_a_queue_says_so(either: gradbank.Client, name: str) -> None:
    loss_fn = either.open(name, losses.NTXentLoss())
    before = loss_fn(*batch(0))
    with pytest.raises(InvalidRequest, match="NTXentLoss has no queue that could be emptied"):
        loss_fn.reset_queue()
    with pytest.raises(InvalidRequest, match="queue of a CrossBatchMemory, and this is NTXentLoss"):
        loss_fn.add_to_memory(*batch(0))
    assert torch.equal(loss_fn(*batch(0)), before)


def test_what_stays_on_the_server_is_named(either: gradbank.Client, name: str) -> None:
    loss_fn = either.open(name, memory())
    with pytest.raises(AttributeError, match=r"no 'queue_idx': the CrossBatchMemory's is .* loss_fn.local\(\)"):
        _ = loss_fn.queue_idx
    with pytest.raises(AttributeError, match="has no attribute 'queue_index'"):
        _ = loss_fn.queue_index
    assert not hasattr(loss_fn, "embedding_memory")


def test_it_can_be_awaited(nearby: Any, name: str) -> None:
    async def train() -> tuple[int, Tensor]:
        async with await gradbank.aio.connect(nearby.address) as client:
            loss_fn = await client.open(name, memory())
            await loss_fn(*batch(0))
            await loss_fn.reset_queue()
            await loss_fn.add_to_memory(*batch(1, 20))
            return (await client.stats(name)).bank_rows, await loss_fn(*batch(2))

    rows, loss = asyncio.run(train())
    here = memory()
    here.add_to_memory(*batch(1, 20))
    assert rows == 20
    assert torch.equal(loss, here(*batch(2)))


def test_emptying_it_may_be_the_first_that_a_trainer_does(anyway: gradbank.Client, name: str) -> None:
    one, other = (anyway.open(name, memory(), rank=rank) for rank in range(2))
    other(*batch(0))
    one.reset_queue()
    assert anyway.stats(name).bank_rows == 0
    other(*batch(1))
    one.close()
    one.reset_queue()
    assert anyway.stats(name).bank_rows == 0


def test_a_flush_may_be_the_first_after_a_close(anyway: gradbank.Client, name: str) -> None:
    head = anyway.open(name, losses.ArcFaceLoss(4, 16))
    optimizer = head.optimizer("SGD", lr=0.1)
    before = head.local().W.detach().clone()
    embeddings, labels = batch(0)
    head(embeddings.requires_grad_(), labels).backward()
    optimizer.step()
    head.close()
    head.flush()
    assert not torch.equal(head.local().W, before)


def test_one_that_was_interrupted_at_its_end_is_not_repeated(
    either: gradbank.Client, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (either.open(name, memory(), rank=rank) for rank in range(2))
    one(*batch(0))
    result = one.producer.result

    def interrupted(*arguments: Any) -> Any:
        result(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(one.producer, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.reset_queue()
    other(*batch(1))
    one.reset_queue()  # asked for again
    assert either.stats(name).bank_rows == 8
    assert either.stats(name).replayed == 1
    one.reset_queue()
    assert either.stats(name).bank_rows == 0


def test_rows_that_only_enter_are_no_loss_of_zero(either: gradbank.Client, name: str) -> None:
    there = either.open(name, memory())
    there(*batch(0))
    before = either.stats(name)
    there.add_to_memory(*batch(1))
    after = either.stats(name)
    assert (after.steps, after.last_loss, after.mean_loss) == (1, before.last_loss, before.mean_loss)
    assert after.bank_rows == 16
