"""The queue of past embeddings: what enters where, and what it is compared with."""

from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses

from gradbank import distances, engine, losses, miners

DIMENSION = 4
PAIR_LOSSES = ("ContrastiveLoss", "MultiSimilarityLoss", "NTXentLoss", "SupConLoss", "TripletMarginLoss")


def test_rows_enter_in_order_and_wrap_around(queue_of: Any) -> None:
    queue = queue_of(10)
    rows = torch.arange(12.0)[:, None].expand(12, DIMENSION)
    assert (len(queue), queue.queue_idx, queue.has_been_filled) == (0, 0, False)
    for start, cursor, filled in ((0, 4, False), (4, 8, False), (8, 2, True)):
        queue(rows[start : start + 4] + 1, torch.arange(4))
        assert (queue.queue_idx, queue.has_been_filled) == (cursor, filled)
        assert queue.curr_batch_idx.tolist() == [(start + i) % 10 for i in range(4)]
    assert queue.label_memory.tolist() == [2, 3, 2, 3, 0, 1, 2, 3, 0, 1]
    assert queue.embedding_memory[:, 0].tolist() == [11, 12, 3, 4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("rows", [5, 10])
def test_landing_on_the_first_slot_fills_the_queue(rows: int, queue_of: Any, batch: Any) -> None:
    queue = queue_of(10)
    for step in range(10 // rows):
        assert not queue.has_been_filled
        queue(*batch(rows, step))
    assert (queue.queue_idx, queue.has_been_filled, len(queue)) == (0, True, 10)


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_batch_as_large_as_the_queue_is_compared_with_itself(loss: str, batch: Any) -> None:
    """The value is the inner loss; the gradient reaches one side of each pair, and so is half."""
    queue = losses.CrossBatchMemory(getattr(losses, loss)(), DIMENSION, 12)
    for step in range(3):
        embeddings, labels = batch(12, step, torch.float64)
        gradients = []
        for compared in (queue, getattr(losses, loss)()):
            leaf = embeddings.clone().requires_grad_()
            value = compared(leaf, labels)
            value.backward()
            assert leaf.grad is not None
            gradients.append((value.detach(), leaf.grad))
        torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=1e-12, atol=0)
        if loss == "ContrastiveLoss":  # symmetric: the other losses weigh (a, b) and (b, a) apart
            torch.testing.assert_close(2 * gradients[0][1], gradients[1][1], rtol=1e-9, atol=1e-12)


def test_an_empty_mask_enters_nothing(queue_of: Any, batch: Any, state: Any) -> None:
    """PML takes the queue for filled then, and compares with rows of zeros ever after."""
    queue = queue_of(10, steps=1)
    before = state(queue)
    embeddings, labels = batch(4, 7)
    value = queue(embeddings, labels, enqueue_mask=torch.zeros(4, dtype=torch.bool))
    assert state(queue) == before
    references, ref_labels = queue.embedding_memory[:4], queue.label_memory[:4]
    assert torch.equal(
        value, losses.NTXentLoss()(embeddings, labels, ref_emb=references, ref_labels=ref_labels.clone())
    )


def test_a_mask_of_every_row_compares_nothing(queue_of: Any, batch: Any) -> None:
    queue = queue_of(10, steps=1)
    embeddings, labels = batch(4, 7)
    embeddings.requires_grad_()
    value = queue(embeddings, labels, enqueue_mask=torch.ones(4, dtype=torch.bool))
    value.backward()
    assert value == 0
    assert embeddings.grad is not None
    assert not embeddings.grad.any()
    assert torch.equal(queue.embedding_memory[4:8], embeddings.detach())
    assert len(queue) == 8


def test_masked_rows_that_overfill_the_queue_are_refused_and_others_are_not(
    queue_of: Any, batch: Any, state: Any
) -> None:
    """PML writes 15 rows into 10 slots and forgets that they are full."""
    queue = queue_of(10, steps=1)
    before = state(queue)
    embeddings, labels = batch(15, 7)
    with pytest.raises(ValueError, match="11 rows do not fit a memory of 10"):
        queue(embeddings, labels, enqueue_mask=torch.arange(15) < 11)
    assert state(queue) == before
    queue(embeddings, labels, enqueue_mask=torch.arange(15) < 10)
    assert (len(queue), queue.queue_idx, queue.has_been_filled) == (10, 4, True)


def test_rows_added_without_a_loss_count_like_others(queue_of: Any, batch: Any, state: Any) -> None:
    queue, other = queue_of(10, steps=3), queue_of(10)
    for step in range(3):
        other.add_to_memory(*batch(4, step))
    assert state(queue) == state(other)
    assert torch.equal(queue(*batch(4, 9)), other(*batch(4, 9)))


@pytest.mark.parametrize("loss", PAIR_LOSSES)
@pytest.mark.parametrize("form", [3, 4])
def test_indices_name_rows_of_the_batch_wherever_it_lies(loss: str, form: int, batch: Any) -> None:
    """PML takes them for slots, so that from the second step on they name rows of other batches."""
    queue = losses.CrossBatchMemory(getattr(losses, loss)(), DIMENSION, 10)
    for step in range(5):
        embeddings, labels = batch(4, step, torch.float64)
        listed = tuple(torch.tensor(each) for each in ([0, 1, 1], [1, 2, 2], [0, 3, 3], [2, 0, 1])[:form])
        slots = (queue.queue_idx + torch.arange(4)) % 10
        value = queue(embeddings, labels, listed)
        size = len(queue)
        rows, known = queue.embedding_memory[:size].double(), queue.label_memory[:size]
        rows[slots] = embeddings
        same = labels[:, None] == known
        differ = ~same
        same[torch.arange(4), slots] = False
        a1, p, a2, n = listed if form == 4 else (listed[0], listed[1], listed[0], listed[2])
        joined = (
            torch.cat([same.nonzero()[:, 0], a1]),
            torch.cat([same.nonzero()[:, 1], slots[p]]),
            torch.cat([differ.nonzero()[:, 0], a2]),
            torch.cat([differ.nonzero()[:, 1], slots[n]]),
        )
        wanted = getattr(losses, loss)()(embeddings, labels, joined, ref_emb=rows, ref_labels=known)
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("distance", [distances.CosineSimilarity, distances.LpDistance, distances.DotProductSimilarity])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("engine_name", ["dense", "tiled"])
def test_backward_may_follow_later_steps(distance: Any, masked: bool, engine_name: str, batch: Any) -> None:
    """The queue is written in place by then; the gradient is of what it was."""
    options = {} if distance is distances.CosineSimilarity else {"normalize_embeddings": False}
    mask = torch.zeros(4, dtype=torch.bool) if masked else None
    gradients = []
    for late in (False, True):
        queue = losses.CrossBatchMemory(losses.NTXentLoss(0.5, distance=distance(**options)), DIMENSION, 10)
        for step in range(4):
            queue(*batch(4, step))
        embeddings, labels = batch(4, 5)
        with engine.using(engine_name):
            value = queue(embeddings.requires_grad_(), labels, enqueue_mask=mask)
        for step in range(3 if late else 0):
            queue(*batch(4, step))
        value.backward()
        gradients.append(embeddings.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_mined_queue_is_the_same_in_tiles(loss: str, batch: Any) -> None:
    """Tiles end where the pieces of a queue do: rows before the cursor, the batch, and rows behind it."""
    made = [
        losses.CrossBatchMemory(getattr(losses, loss)(), DIMENSION, 10, miners.MultiSimilarityMiner()) for _ in "123"
    ]
    engines = ("dense", None), ("tiled", None), ("tiled", engine.Bounds(tile=7, rows=2, positives=3))
    for step in range(8):
        answers = []
        for queue, (name, bounds) in zip(made, engines, strict=True):
            embeddings, labels = batch(4, step, torch.float64)
            with engine.using(name, bounds):
                value = queue(embeddings.requires_grad_(), labels)
            value.backward()
            answers.append((value.detach(), embeddings.grad))
        for other in answers[1:]:
            torch.testing.assert_close(other, answers[0], rtol=1e-9, atol=1e-12)


def test_it_names_the_losses_that_it_takes() -> None:
    named = losses.CrossBatchMemory.supported_losses()
    assert set(pml_losses.CrossBatchMemory.supported_losses()) < set(named)
    assert not {"ArcFaceLoss", "FastAPLoss", "MultipleLosses", "CrossBatchMemory", "DynamicSoftMarginLoss"} & set(named)


def test_the_last_slots_are_known_until_the_next_batch(queue_of: Any, batch: Any) -> None:
    queue = queue_of(10)
    for expected in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]):
        queue(*batch(4, 0))
        for _ in range(2):
            assert queue.curr_batch_idx.tolist() == expected
            assert len(queue.embedding_memory) == 10  # which writes the rows that wait
    queue.reset_queue()
    assert queue.curr_batch_idx.tolist() == []


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_queue_becomes_of_another_dtype_with_the_rows_that_wait(queue_of: Any, batch: Any, steps: int) -> None:
    queue, reference = queue_of(10, steps=steps), queue_of(10, steps=steps)
    rows = reference.embedding_memory.double()
    queue.double()
    assert torch.equal(queue.embedding_memory, rows)
    assert queue.label_memory.dtype == torch.int64
    embeddings, labels = batch(4, 9)
    queue(embeddings.double(), labels)
    assert queue.embedding_memory.dtype == torch.float64


@pytest.mark.parametrize("size", [0, -1, 20.0, "20"])
def test_sizes_are_whole_numbers(size: Any) -> None:
    with pytest.raises(ValueError, match=f"memory_size must be a whole number, at least 1, got {size!r}"):
        losses.CrossBatchMemory(losses.NTXentLoss(), 8, size)


@pytest.mark.parametrize("loss", [losses.P2SGradLoss(6, 4), losses.ManifoldLoss(6), losses.VICRegLoss()], ids=str)
def test_a_loss_that_would_not_look_at_the_queue_is_refused(loss: Any) -> None:
    name = type(loss).__name__
    with pytest.raises(ValueError, match=f"needs a loss that compares embeddings with references, got {name}"):
        losses.CrossBatchMemory(loss, 6)
    with pytest.raises(ValueError, match=f"CrossBatchMemory does not support {name}; it does AngularLoss, "):
        losses.CrossBatchMemory.check_loss_support(name)


def test_every_loss_that_is_said_to_be_supported_is() -> None:
    embeddings, labels = torch.randn(12, 6), torch.arange(12) % 3
    for name in losses.CrossBatchMemory.supported_losses():
        losses.CrossBatchMemory.check_loss_support(name)
        if not hasattr(losses, name):  # of another test
            continue
        assert losses.CrossBatchMemory(getattr(losses, name)(), 6)(embeddings, labels).isfinite()


def test_a_forward_that_a_queue_does_not_call_is_warned_of() -> None:
    class Louder(losses.NTXentLoss):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) * 2

    with pytest.warns(UserWarning, match="does not call its forward"):
        losses.CrossBatchMemory(Louder(), 4)
