"""A queue that is filled by hand before the first batch, as a buffer of PML's is."""

import pytest
import torch

from gradbank import losses


def queue(memory_size: int = 16) -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.ContrastiveLoss(), embedding_size=8, memory_size=memory_size)


@pytest.mark.parametrize("how", ["in place", "behind torch's back", "set"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_written_before_the_first_batch_is_in_the_queue(how: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, labels = torch.randn(10, 8), torch.ones(10, dtype=torch.int64)
    filled, stepped = queue(), queue()
    if how == "set":
        filled.label_memory = torch.cat([labels, labels.new_zeros(6)])
        filled.embedding_memory = torch.cat([rows, rows.new_zeros(6, 8)])
    else:
        held = filled.embedding_memory, filled.label_memory
        memory, known = held if how == "in place" else (each.data for each in held)
        memory[:10], known[:10] = rows, labels
    filled.queue_idx = 10
    stepped.add_to_memory(rows, labels)
    batch = torch.randn(4, 8, dtype=dtype), torch.tensor([1, 1, 2, 2])
    assert torch.equal(filled(*batch), stepped(*batch))
    assert torch.equal(filled.embedding_memory, stepped.embedding_memory)
    assert filled.label_memory.tolist() == [1] * 12 + [2, 2, 0, 0]


def test_labels_may_be_given_before_the_rows() -> None:
    memory = queue()
    memory.label_memory = torch.full((16,), 3)
    assert memory.label_memory.tolist() == [3] * 16


def test_looking_at_an_empty_queue_gives_it_no_dtype() -> None:
    memory = queue()
    assert not bool(memory.embedding_memory.any())
    memory(torch.randn(4, 8, dtype=torch.float64), torch.arange(4))
    assert memory.embedding_memory.dtype == torch.float64


def test_a_queue_may_be_looked_at_in_any_mode() -> None:
    memory = queue()
    with torch.inference_mode():
        assert not bool(memory.embedding_memory.any())
    for _ in range(2):
        memory(torch.randn(4, 8), torch.arange(4))
    assert len(memory) == 8


def test_a_refused_batch_leaves_what_was_handed_out_in_place() -> None:
    memory = queue()
    held = memory.embedding_memory
    with pytest.raises(ValueError, match="must stay within"):
        memory(torch.randn(4, 8, dtype=torch.float64), torch.arange(4), (torch.tensor([9]),) * 3)
    held[0] = 5
    assert bool((memory.embedding_memory[0] == 5).all())


def test_a_queue_that_is_reset_has_the_size_that_it_is_to_have() -> None:
    memory = queue()
    memory(torch.randn(4, 8), torch.arange(4))
    memory.memory_size, memory.embedding_size = 5, 6
    memory.reset_queue()
    assert memory.embedding_memory.shape == (5, 6)
    memory(torch.randn(5, 6), torch.arange(5))
    assert memory.has_been_filled
    with pytest.raises(AssertionError, match="6 rows do not fit a memory of 5"):  # as in PML
        memory(torch.randn(6, 6), torch.arange(6))
