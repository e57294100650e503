"""Running out of memory anywhere in a step: the queue is as before, and trying again gives what it would have."""

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradbank import engine, losses, miners

PAIR_LOSSES = ("ContrastiveLoss", "MultiSimilarityLoss", "NTXentLoss", "SupConLoss", "TripletMarginLoss")
DIMENSION, MEMORY = 4, 20


class FailAt(TorchDispatchMode):
    """Raises in place of the operation of that number; counts them all."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.number:
            raise torch.OutOfMemoryError(f"injected at operation {self.count}, {function}")
        return function(*args, **(kwargs or {}))


def answer(queue: losses.CrossBatchMemory, seed: int, use: str, engine_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    embeddings, labels = torch.randn(6, DIMENSION, requires_grad=True), torch.tensor([0, 0, 1, 1, 2, 0])
    rest = {
        "masked": {"enqueue_mask": torch.tensor([True, False] * 3)},
        "listed": {"indices_tuple": tuple(torch.tensor(each) for each in ([0, 2], [1, 3], [4, 5]))},
    }.get(use, {})
    with engine.using(engine_name):
        value = queue(embeddings, labels, **rest)
    value.backward()
    assert embeddings.grad is not None
    return value.detach(), embeddings.grad


@pytest.mark.parametrize(
    ("use", "engine_name", "steps"),
    [(use, "dense", 3) for use in ("plain", "mined", "masked", "listed")]  # 18 of 20 slots: it will wrap
    + [("plain", "tiled", 3), ("plain", "dense", 0), ("masked", "tiled", 0)],
)
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_failure_at_any_operation_leaves_the_queue_as_it_was(
    loss: str, use: str, engine_name: str, steps: int, state: Any
) -> None:
    miner = miners.MultiSimilarityMiner() if use == "mined" else None
    prepared = losses.CrossBatchMemory(getattr(losses, loss)(), DIMENSION, MEMORY, miner)
    for step in range(steps):
        answer(prepared, step, "plain", engine_name)
    before = state(copy.deepcopy(prepared))
    whole = copy.deepcopy(prepared)
    with FailAt(0) as counting:
        wanted = answer(whole, 9, use, engine_name)
    after = state(whole)
    assert counting.count > 30
    failed = 0
    for number in range(1, counting.count + 1):
        queue = copy.deepcopy(prepared)
        try:
            with FailAt(number):
                answer(queue, 9, use, engine_name)
        except torch.OutOfMemoryError:
            failed += 1
        else:
            pytest.fail(f"operation {number} did not fail")
        if state(queue) == after:
            continue  # it failed in the backward pass: the step had happened
        assert state(queue) == before, number
        value, gradient = answer(queue, 9, use, engine_name)
        assert torch.equal(value, wanted[0])
        assert torch.equal(gradient, wanted[1])
        assert state(queue) == after
    assert failed == counting.count
