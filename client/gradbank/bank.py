"""A bank: the last rows that entered it, with their labels, by slot."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradbank.checks import check_finite
from gradbank.engine import References
from gradbank.mismatch import Mismatch


class Entering(NamedTuple):
    """Rows that enter the queue at slot `start`, wrapping around its end."""

    rows: Tensor  # (N, D)
    labels: Tensor  # (N,)
    start: int
    is_first: bool = False  # of a bank that was looked at, and has another dtype or device by that


class _Squares(NamedTuple):
    lengths: Tensor  # (capacity,)
    slots: Tensor  # of which rows
    version: int  # that these had


_ROWS_AT_ONCE = 2**13
SAVED_BY_PML = ("embedding_memory", "label_memory")
STATE = (*SAVED_BY_PML, "queue_idx", "has_been_filled")  # the names of a bank's state


class Bank(nn.Module):
    """A ring of `capacity` rows of `dimension` numbers.

    A batch enters in two parts. `entering` prepares it, and `references` shows the bank as it will be, without writing
    it; `enter` then puts one reference and two integers in place, which cannot fail half-way. The rows wait beside the
    bank until the next batch, when `settle` writes them over the rows they replace: they count already, so that can be
    done twice without harm.

    Attributes:
        cursor: the slot that the next row enters.
        is_full: whether every slot holds a row.
    """

    def __init__(self, capacity: int, dimension: int) -> None:
        super().__init__()
        self.capacity, self.dimension = capacity, dimension
        self.reset()

    def reset(self) -> None:
        """Empties the bank, which is allocated anew by the first row that settles: one that a server will hold takes
        no memory here."""
        # no buffers: who takes averages of these, or broadcasts them as DDP does, wants their shapes to stay
        self.slots, self.slot_labels = torch.zeros(0, self.dimension), torch.zeros(0, dtype=torch.int64)
        self.waiting: Entering | None = None
        self._last = (0, 0)  # the slot that the last rows entered first, and how many these were
        self._squares: _Squares | None = None
        self._shown = False  # whether somebody else may hold the slots: what he writes to `.data` is not counted
        self.cursor = 0
        self.is_full = False

    def __len__(self) -> int:
        """How many rows the bank holds."""
        return self.capacity if self.is_full else self.cursor

    @property
    def nbytes(self) -> int:
        waiting = self.waiting  # once: another thread may ask while a step is under way
        beside = 0 if waiting is None else waiting.rows.nbytes + waiting.labels.nbytes
        known = self._squares
        beside += 0 if known is None else known.lengths.nbytes
        return self.slots.nbytes + self.slot_labels.nbytes + beside

    def rows(self) -> Tensor:
        """`(capacity, D)` by slot, zeros where there is no row yet; what is written there is in the bank."""
        self._shown = True
        self._show()
        return self.slots

    def labels(self) -> Tensor:
        """`(capacity,)` by slot; what is written there is in the bank."""
        self._show()
        return self.slot_labels

    def _show(self) -> None:
        self.settle()
        if not len(self.slots):
            with torch.inference_mode(False):  # which the bank outlives
                self._allocate(self.slots)

    def _has_no_dtype(self) -> bool:
        """Whether it is empty, and looked at without being written to: that gives it no dtype yet."""
        written = self.cursor or self.is_full or self.waiting is not None
        return not len(self.slots) or not (written or self.slots.any() or self.slot_labels.any())

    def entering(self, rows: Tensor, labels: Tensor) -> Entering:
        """`(N, D)` rows at the slots that they will enter, in the bank's dtype: that of the first batch, float32 at
        least. They are copies, since the caller may go on to write to his own.

        Raises:
            ValueError: more rows than slots.
            NonFiniteError: a number that the bank's dtype does not have.
        """
        if len(rows) > self.capacity:
            raise Mismatch(
                f"{len(rows)} rows do not fit a memory of {self.capacity}: raise memory_size, or enqueue fewer"
            )
        dtype, is_first = torch.promote_types(rows.dtype, torch.float32), False
        if (dtype, rows.device) != (self.slots.dtype, self.slots.device) and len(self.slots):
            is_first = self._has_no_dtype()
            dtype = dtype if is_first else self.slots.dtype
        with torch.inference_mode(False):  # the bank outlives the mode that its rows came in
            kept = labels.detach().to(rows.device, torch.int64, copy=True)
            held = rows.detach().to(dtype, copy=True)
            if dtype != rows.dtype:
                check_finite(held, f"embeddings, in the {dtype} that the memory is of")
            return Entering(held, kept, self.cursor, is_first)

    def slots_of(self, entering: Entering) -> Tensor:
        """`(N,)`: the slot of each entering row."""
        step = torch.arange(len(entering.rows), device=entering.rows.device)
        return (entering.start + step) % self.capacity

    def last_slots(self) -> Tensor:
        """`(N,)`: the slots that the last rows entered."""
        (start, number), held = self._last, self.slots if self.waiting is None else self.waiting.rows
        return (start + torch.arange(number, device=held.device)) % self.capacity

    def references(self, entering: Entering) -> References:
        """The bank as it will be once `entering` is in it, by slot, without writing it. Settle it first."""
        new, first = entering.rows, entering.start
        last, filled = first + len(new), len(self)
        kept = self.slots.to(new.device)
        around = max(last - self.capacity, 0)  # rows that wrap to the front
        head = kept[around:first] if len(kept) else kept
        pieces = (new[len(new) - around :], head, new[: len(new) - around], kept[last:filled])
        labels = torch.cat(
            [
                entering.labels[len(new) - around :],
                self.slot_labels[around:first].to(new.device),
                entering.labels[: len(new) - around],
                self.slot_labels[last:filled].to(new.device),
            ]
        )
        known = self._squares_of(kept)
        squares = (None, known[around:first], None, known[last:filled]) if known is not None else (None,) * 4
        some = [(piece, each) for piece, each in zip(pieces, squares) if len(piece)] or [(new, None)]
        return References(tuple(piece for piece, _ in some), labels, squares=tuple(each for _, each in some))

    def _squares_of(self, slots: Tensor) -> Tensor | None:
        """`(capacity,)`: how long the row of each slot is, squared. It is kept from batch to batch, unless somebody
        else has written to the slots."""
        if self._shown or slots is not self.slots or not len(slots) or slots.is_inference():
            return None
        known = self._squares
        if known is None or known.slots is not slots or known.version != slots._version:
            with torch.inference_mode(False), torch.no_grad():  # they outlive the mode of the step
                lengths = [some.square().sum(1) for some in torch.split(slots, _ROWS_AT_ONCE)]
                self._squares = known = _Squares(torch.cat(lengths), slots, slots._version)
        return known.lengths

    def enter(self, entering: Entering) -> None:
        """Makes `entering` part of the bank: references and integers only, so it cannot fail half-way."""
        last = entering.start + len(entering.rows)
        self.waiting = entering if len(entering.rows) else None
        self._last = (entering.start, len(entering.rows))
        self.cursor = last % self.capacity
        self.is_full = self.is_full or last >= self.capacity

    def settle(self) -> None:
        """Writes the rows that wait into their slots."""
        waiting = self.waiting
        if waiting is None:
            return
        with torch.inference_mode(False):
            if not len(self.slots) or waiting.is_first:
                self._allocate(waiting.rows)
            if self.slots.device != waiting.rows.device:  # after a load from a checkpoint, for one
                self.slots = self.slots.to(waiting.rows.device)
            self.slot_labels = self.slot_labels.to(self.slots.device)
            slots, rows = self.slots_of(waiting), waiting.rows.to(self.slots)
            known = self._squares_of(self.slots)
            self.slots[slots] = rows
            self.slot_labels[slots] = waiting.labels
            if known is not None:
                known[slots] = rows.square().sum(1)
                self._squares = _Squares(known, self.slots, self.slots._version)
        self.waiting = None

    def _allocate(self, like: Tensor) -> None:
        """An empty bank where `like` is, and of its dtype, which is then fixed."""
        slots = torch.zeros(self.capacity, self.dimension, dtype=like.dtype, device=like.device)
        self.slot_labels = torch.zeros(self.capacity, dtype=torch.int64, device=like.device)
        self.slots = slots

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Bank":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        self.slots, self.slot_labels = fn(self.slots), fn(self.slot_labels)
        if self.waiting is not None:  # these go where the others do, and become of their dtype
            self.waiting = self.waiting._replace(rows=fn(self.waiting.rows), labels=fn(self.waiting.labels))
        return self

    def state(self) -> dict[str, Tensor]:
        """All that it takes to go on from here, under PML's names and two more: the cursor and whether it is full."""
        self.settle()
        rows, labels = self.slots, self.slot_labels
        if not len(rows):  # of which there are none only for want of a row
            rows, labels = rows.new_zeros(self.capacity, self.dimension), labels.new_zeros(self.capacity)
        return {
            "embedding_memory": rows.detach(),
            "label_memory": labels,
            "queue_idx": torch.tensor(self.cursor),
            "has_been_filled": torch.tensor(self.is_full),
        }

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of: lengths are of the slots that they were taken of, and no others."""
        return {**self.__dict__, "_squares": None}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`, or from what PML saves of its queue: that does not say which slots were filled, so
        those are taken to be the ones up to the last row that is not zero, and row 0 the oldest of a full queue.

        Raises:
            ValueError: a part is missing or does not fit; the bank is as it was.
        """
        absent = [name for name in STATE if name not in state]
        if absent and state.keys() != set(SAVED_BY_PML):
            raise ValueError(f"a queue cannot be restored without {', '.join(absent)}")
        rows, labels = state["embedding_memory"], state["label_memory"]
        if rows.shape != (self.capacity, self.dimension):
            wanted = (self.capacity, self.dimension)
            raise ValueError(f"size mismatch for embedding_memory: expected {wanted}, got {tuple(rows.shape)}")
        check_finite(rows, "embedding_memory")
        if absent:
            taken = rows.any(1).nonzero()
            held = int(taken[-1]) + 1 if len(taken) else 0
            state = {**state, "queue_idx": held % self.capacity, "has_been_filled": held == self.capacity}
        cursor = int(state["queue_idx"])
        if not rows.is_floating_point() or labels.is_floating_point():
            raise ValueError("embedding_memory must hold floats and label_memory integers")
        if not 0 <= cursor < self.capacity or labels.shape != rows.shape[:1]:
            raise ValueError(f"queue_idx and label_memory do not fit {self.capacity} slots")
        if cursor == 0 and not bool(state["has_been_filled"]) and not bool(rows.any()) and not bool(labels.any()):
            self.reset()  # of what is empty, the dtype says nothing
            return
        self.waiting, self._last = None, (0, 0)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        self.slots, self.slot_labels = (x.detach().to(t, copy=True) for x, t in ((rows, dtype), (labels, torch.int64)))
        self.cursor, self.is_full = cursor, bool(state["has_been_filled"])
