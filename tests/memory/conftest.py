"""Queues, the batches that enter them, and all that can be seen of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gradbank import losses

DIMENSION = 4


def _batch(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rows, DIMENSION, generator=generator, dtype=dtype)
    return drawn, torch.randint(4, (rows,), generator=generator)


def _state(queue: losses.CrossBatchMemory) -> tuple[Any, ...]:
    rows, labels = queue.embedding_memory.tolist(), queue.label_memory.tolist()
    return rows, labels, queue.queue_idx, queue.has_been_filled, len(queue), queue.embedding_memory.dtype


def _queue_of(size: int, steps: int = 0, **options: Any) -> losses.CrossBatchMemory:
    made = losses.CrossBatchMemory(losses.NTXentLoss(), DIMENSION, size, **options)
    for step in range(steps):
        made(*_batch(4, step))
    return made


@pytest.fixture
def batch() -> Callable[..., tuple[Tensor, Tensor]]:
    """`batch(rows, seed, dtype)`: embeddings and labels."""
    return _batch


@pytest.fixture
def state() -> Callable[[losses.CrossBatchMemory], tuple[Any, ...]]:
    """`state(queue)`: equal for queues that cannot be told apart."""
    return _state


@pytest.fixture
def queue_of() -> Callable[..., losses.CrossBatchMemory]:
    """`queue_of(size, steps)`: a queue that `steps` batches of four have entered, `batch(4, 0)` first."""
    return _queue_of
