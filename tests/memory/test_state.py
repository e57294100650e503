"""The queue's state: what survives saving, copying and refusing, and in which precision."""

import copy
import io
from typing import Any

import pytest
import pytorch_metric_learning.losses as pml_losses
import torch
from torch import Tensor

from gradbank import losses, miners
from gradbank.errors import NonFiniteError

DIMENSION = 4

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "more rows than slots": ({"embeddings": torch.ones(11, 4), "labels": torch.arange(11)}, "11 rows do not fit"),
    "another dimension": ({"embeddings": torch.ones(4, 5)}, "dimension 5, .* embedding_size=4"),
    "integers": ({"embeddings": torch.ones(4, 4, dtype=torch.int64)}, "must be floating point"),
    "a vector": ({"embeddings": torch.ones(4)}, r"must be \(batch, dimension\)"),
    "too few labels": ({"labels": torch.arange(3)}, r"labels must be \(4,\)"),
    "labels of fractions": ({"labels": torch.arange(4) / 2}, "must be whole numbers"),
    "labels that int64 has not": ({"labels": torch.tensor([1e30, 1e30, 2e30, 2e30])}, "whole numbers below 2"),
    "labels without an end": ({"labels": torch.full((4,), torch.inf)}, "whole numbers below 2"),
    "labels of NaN": ({"labels": torch.full((4,), torch.nan)}, "must be whole numbers"),
    "a mask that is too short": ({"enqueue_mask": torch.ones(3, dtype=torch.bool)}, r"must be \(4,\) booleans"),
    "a mask of numbers": ({"enqueue_mask": torch.ones(4, dtype=torch.int64)}, "booleans, got .* torch.int64"),
    "a mask of floats": ({"enqueue_mask": torch.ones(4)}, "booleans, got .* torch.float32"),
    "a position outside": ({"enqueue_idx": torch.tensor([4])}, "enqueue_idx"),
    "a negative position": ({"enqueue_idx": torch.tensor([-1])}, "enqueue_idx"),
    "mask and positions": (
        {"enqueue_mask": torch.ones(4, dtype=torch.bool), "enqueue_idx": torch.tensor([0])},
        "pass one of them",
    ),
    "mask and indices": (
        {"enqueue_mask": torch.ones(4, dtype=torch.bool), "indices_tuple": (torch.tensor([0]),) * 3},
        "mutually exclusive",
    ),
    "an index outside": ({"indices_tuple": tuple(torch.tensor([i]) for i in (0, 1, 4))}, "must stay within 0..3"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_call_changes_nothing(what: str, queue_of: Any, batch: Any, state: Any) -> None:
    wrong, message = REFUSED[what]
    queue = queue_of(10, steps=2)
    before = state(queue)
    embeddings, labels = batch(4, 9)
    with pytest.raises(ValueError, match=message):
        queue(**({"embeddings": embeddings, "labels": labels} | wrong))
    assert state(queue) == before
    assert torch.equal(queue(embeddings, labels), queue_of(10, steps=2)(embeddings, labels))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_first_row_that_is_not_finite_is_named(bad: float, queue_of: Any, batch: Any, state: Any) -> None:
    queue = queue_of(10, steps=2)
    before = state(queue)
    embeddings, labels = batch(6, 9)
    embeddings[2, 1] = embeddings[5, 0] = bad
    with pytest.raises(NonFiniteError, match=r"row 2 is not finite \(2 of 6 rows"):
        queue(embeddings, labels)
    with pytest.raises(NonFiniteError, match="row 2"):
        queue.add_to_memory(embeddings, labels)
    assert state(queue) == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [(torch.ones(11, 4), "11 rows do not fit a memory of 10"), (torch.ones(3, 5), "embedding_size=4")],
)
def test_rows_added_without_a_loss_must_fit_too(rows: Tensor, message: str, queue_of: Any, state: Any) -> None:
    queue = queue_of(10, steps=2)
    before = state(queue)
    with pytest.raises(ValueError, match=message):
        queue.add_to_memory(rows, torch.zeros(len(rows), dtype=torch.int64))
    assert state(queue) == before


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7])
def test_saved_queue_goes_on_as_if_it_had_not_been(steps: int, queue_of: Any, batch: Any, state: Any) -> None:
    """PML saves neither cursor nor fill."""
    queue, restored = queue_of(10, steps, miner=miners.MultiSimilarityMiner()), queue_of(10, 1)
    restored.miner = miners.MultiSimilarityMiner()
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert state(restored) == state(queue)
    for step in range(4):
        assert torch.equal(restored(*batch(4, 20 + step)), queue(*batch(4, 20 + step)))


def test_saved_state_is_a_copy(queue_of: Any, batch: Any, state: Any) -> None:
    queue = queue_of(10, steps=2)
    saved = queue.state_dict()
    other = queue_of(10)
    other.load_state_dict(saved)
    before = state(other)
    queue(*batch(8, 5))
    queue(*batch(1, 6))
    assert state(other) == before


def test_state_of_another_size_is_refused(queue_of: Any, state: Any) -> None:
    queue = queue_of(10, steps=2)
    before = state(queue)
    with pytest.raises(RuntimeError, match=r"expected \(10, 4\), got \(12, 4\)"):
        queue.load_state_dict(queue_of(12, steps=1).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*queue_idx"):
        queue.load_state_dict({name: value for name, value in queue.state_dict().items() if name != "queue_idx"})
    assert state(queue) == before


def test_reset_queue_is_empty_as_at_first(queue_of: Any, batch: Any, state: Any) -> None:
    queue = queue_of(10, steps=4)
    queue.reset_queue()
    assert state(queue) == state(queue_of(10))
    assert torch.equal(queue(*batch(4, 5)), queue_of(10)(*batch(4, 5)))


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_deep_copy_lives_apart(steps: int, queue_of: Any, batch: Any, state: Any) -> None:
    queue = queue_of(10, steps)
    other = copy.deepcopy(queue)
    assert state(other) == state(queue)
    assert torch.equal(other(*batch(4, 5)), queue(*batch(4, 5)))
    other(*batch(4, 6))
    untouched = queue_of(10, steps)
    untouched(*batch(4, 5))
    assert state(queue) == state(untouched)


@pytest.mark.parametrize(
    "how", ["in place", "through .data", "in a deep copy", "after inference", "loaded", "to float64", "not at all"]
)
def test_rows_that_somebody_else_wrote_are_compared_as_they_are(how: str, batch: Any) -> None:
    """A queue keeps how long its rows are, and must not take new ones for the old."""
    used, fresh = (losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 10) for _ in range(2))
    for step in range(4):
        used(*batch(4, step))
    longer = batch(10, 9)[0] * 5
    if how == "in place":
        used.embedding_memory[:] = longer
    elif how == "through .data":
        used.embedding_memory.data.copy_(longer)
    elif how == "in a deep copy":
        used = copy.deepcopy(used)
        for _ in range(6):  # as often as the rows of the other were written to
            used.embedding_memory.copy_(longer)
            torch.testing.assert_close(*(loss(*batch(4, 7)) for loss in (used, copy.deepcopy(used))), rtol=0, atol=0)
    elif how == "after inference":
        used.load_state_dict({**used.state_dict(), "embedding_memory": longer})
        with torch.inference_mode():
            used(*batch(4, 7))
    elif how == "loaded":
        used.load_state_dict({**used.state_dict(), "embedding_memory": longer})
    elif how == "to float64":
        used.double()
    fresh.load_state_dict(used.state_dict())
    rows, labels = batch(4, 8, used.embedding_memory.dtype)
    torch.testing.assert_close(used(rows, labels), fresh(rows, labels), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_batches_enter_a_float32_queue(dtype: torch.dtype, queue_of: Any, batch: Any) -> None:
    """PML turns the whole queue to the dtype of whichever batch came last."""
    queue = queue_of(10, steps=3)
    before = queue.embedding_memory.clone()
    embeddings, labels = batch(4, 5, dtype)
    value = queue(embeddings.requires_grad_(), labels)
    value.backward()
    assert value.dtype == torch.float32
    assert embeddings.grad is not None
    assert embeddings.grad.dtype == dtype
    assert queue.embedding_memory.dtype == torch.float32
    kept = torch.ones(10, dtype=torch.bool)
    kept[[2, 3, 4, 5]] = False
    assert torch.equal(queue.embedding_memory[kept], before[kept])
    assert torch.equal(queue.embedding_memory[~kept], embeddings.detach().float())


@pytest.mark.parametrize("looked_at", [False, True])
def test_float64_batches_are_kept_to_the_last_digit(looked_at: bool, queue_of: Any, batch: Any) -> None:
    queue = queue_of(10)
    if looked_at:
        assert not queue.embedding_memory.any()
        assert not queue.state_dict()["embedding_memory"].any()
    theirs = pml_losses.CrossBatchMemory(pml_losses.NTXentLoss(), DIMENSION, 10)
    for step in range(6):
        embeddings, labels = batch(4, step, torch.float64)
        value = queue(embeddings, labels)
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, theirs(embeddings, labels), rtol=1e-12, atol=0)
    assert torch.equal(queue.embedding_memory, theirs.embedding_memory)


def test_queue_does_not_follow_the_tensor_that_was_passed(queue_of: Any, batch: Any) -> None:
    queue = queue_of(10)
    embeddings, labels = batch(4, 0)
    queue(embeddings, labels)
    embeddings.zero_()
    labels.zero_()
    assert torch.equal(queue.embedding_memory[:4], batch(4, 0)[0])
    assert torch.equal(queue.label_memory[:4], batch(4, 0)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((losses.ArcFaceLoss(3, 4), 4, 10), "compares embeddings with references, got ArcFaceLoss"),
        ((losses.NTXentLoss(), 0, 10), "embedding_size must be a whole number, at least 1"),
        ((losses.NTXentLoss(), 4, 0), "memory_size must be a whole number, at least 1"),
        (
            (losses.CrossBatchMemory(losses.NTXentLoss(), 4), 4, 10),
            "loss must be a BaseMetricLossFunction, got .*Memory",
        ),
    ],
)
def test_queue_that_makes_no_sense_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        losses.CrossBatchMemory(*arguments)


def test_a_checkpoint_of_narrow_labels_or_rows_goes_on(queue_of: Any, batch: Any) -> None:
    whole, narrow = queue_of(10, 2), queue_of(10, 0)
    state = whole.state_dict()
    state["embedding_memory"] = state["embedding_memory"].half().float()  # as float16 can hold
    whole.load_state_dict(state)
    narrow.load_state_dict(
        {**state, "embedding_memory": state["embedding_memory"].half(), "label_memory": state["label_memory"].int()}
    )
    for seed in range(3):
        assert torch.equal(narrow(*batch(4, seed)), whole(*batch(4, seed)))
    assert narrow.embedding_memory.dtype == torch.float32
    assert torch.equal(narrow.label_memory, whole.label_memory)


@pytest.mark.parametrize("first", [torch.float64, torch.float32])
@pytest.mark.parametrize("then", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("miner", ["BatchHardMiner", "DistanceWeightedMiner", "AngularMiner", "PairMarginMiner", None])
def test_a_batch_may_be_of_another_dtype_than_the_queue(
    first: torch.dtype, then: torch.dtype, miner: str | None
) -> None:
    torch.manual_seed(0)
    made = None if miner is None else getattr(miners, miner)()
    queue = losses.CrossBatchMemory(losses.TripletMarginLoss(), 6, 30, made)
    labels = torch.arange(12) % 3
    queue(torch.randn(12, 6, dtype=first), labels)
    embeddings = torch.randn(12, 6).to(then).requires_grad_()
    queue(embeddings, labels).backward()
    assert embeddings.grad is not None
    assert (embeddings.grad.dtype, queue.embedding_memory.dtype) == (then, first)


@pytest.mark.parametrize("entered", [[3], [8, 2], [8, 5]], ids=["partly filled", "full", "around the end"])
def test_what_pml_saved_of_its_queue_is_loaded(batch: Any, entered: list[int]) -> None:
    theirs = pml_losses.CrossBatchMemory(pml_losses.NTXentLoss(), 4, 10)
    for seed, number in enumerate(entered):
        theirs(*batch(number, seed))
    theirs.embedding_memory[1] = 0  # a row like any other
    ours = losses.CrossBatchMemory(losses.NTXentLoss(), 4, 10)
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    assert torch.equal(ours.embedding_memory, theirs.embedding_memory)
    assert torch.equal(ours.label_memory, theirs.label_memory)
    assert ours.has_been_filled == theirs.has_been_filled
    if not theirs.has_been_filled:  # else PML says nothing of where it went on, and restores nothing itself
        assert ours.queue_idx == theirs.queue_idx
    ours.queue_idx = theirs.queue_idx
    more = batch(2, 9)
    torch.testing.assert_close(ours(*more), theirs(*more))
    assert torch.equal(ours.embedding_memory, theirs.embedding_memory)


def test_a_queue_can_be_set_by_hand(queue_of: Any, batch: Any, state: Any) -> None:
    queue, other = queue_of(10, steps=3), queue_of(10)
    for name in ("embedding_memory", "label_memory", "queue_idx", "has_been_filled"):
        setattr(other, name, getattr(queue, name))
    assert state(other) == state(queue)
    assert torch.equal(other(*batch(3, 7)), queue(*batch(3, 7)))
    before = state(other)
    with pytest.raises(ValueError, match="queue_idx and label_memory do not fit 10 slots"):
        other.queue_idx = 10
    with pytest.raises(ValueError, match=r"embedding_memory: expected \(10, 4\), got \(4, 10\)"):
        other.embedding_memory = torch.zeros(4, 10)
    assert state(other) == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [(torch.ones(4), r"expected \(10, 4\), got \(4,\)"), (torch.full((10, 4), torch.nan), "row 0 is not finite")],
    ids=["shape", "NaN"],
)
def test_what_pml_cannot_have_saved_is_refused(queue_of: Any, state: Any, rows: Tensor, message: str) -> None:
    queue = queue_of(10, steps=2)
    before, last = state(queue), queue.curr_batch_idx
    with pytest.raises(RuntimeError, match=message):
        queue.load_state_dict({"embedding_memory": rows, "label_memory": torch.zeros(10, dtype=torch.int64)})
    with pytest.raises(ValueError, match=message):
        queue.embedding_memory = rows
    assert state(queue) == before
    queue.queue_idx = 3
    assert torch.equal(queue.curr_batch_idx, last)


def test_labels_may_be_whole_floats(queue_of: Any, batch: Any, state: Any) -> None:
    queue, other = queue_of(10, steps=2), queue_of(10, steps=2)
    embeddings, labels = batch(4, 5)
    assert torch.equal(queue(embeddings, labels), other(embeddings, labels.double()))
    queue.add_to_memory(embeddings, labels)
    other.add_to_memory(embeddings, labels.float())
    assert state(queue) == state(other)


def test_an_empty_queue_that_was_loaded_takes_the_dtype_of_its_first_batch(queue_of: Any, batch: Any) -> None:
    loaded, emptied = queue_of(10), queue_of(10, steps=1)
    loaded.load_state_dict(queue_of(10).state_dict())
    emptied.reset_queue()
    emptied.load_state_dict(emptied.state_dict())
    for queue in (loaded, emptied):
        queue(*batch(4, 0, torch.float64))
        assert queue.embedding_memory.dtype == torch.float64


def test_numbers_that_its_dtype_has_not_are_refused(queue_of: Any, batch: Any, state: Any) -> None:
    queue = queue_of(10, steps=1)
    before = state(queue)
    embeddings, labels = batch(4, 1, torch.float64)
    with pytest.raises(NonFiniteError, match=r"embeddings, in the torch.float32 that the memory is of: row 0 is not"):
        queue(embeddings * 1e39, labels)
    assert state(queue) == before
