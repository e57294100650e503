"""A queue of past embeddings to compare each batch with."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbank.checks import check_batch, check_finite
from gradbank.component import component
from gradbank.engine import (
    Indices,
    JoinedPairs,
    LabelledPairs,
    ListedPairs,
    MinedPairs,
    Pairs,
    References,
    as_pairs,
    check_indices,
    full_precision,
    widened,
)
from gradbank.losses.base import Loss, PairLoss, Staged
from gradbank.miners.base import Miner


class Entering(NamedTuple):
    """Rows that enter the queue at slot `start`, wrapping around its end."""

    rows: Tensor  # (N, D)
    labels: Tensor  # (N,)
    start: int


@component
class CrossBatchMemory(Loss):
    """Computes `loss` between each batch and the last `memory_size` embeddings, the batch included.

    Each call first enters the batch into the queue, overwriting the oldest rows, then compares it with the whole
    queue; an anchor's own row is not its positive. Rows in the queue get no gradient.

    A call that fails leaves the queue as it was: entering rows wait beside the queue, are compared with from there,
    and are written over the rows they replace by the next call, which can be done twice without harm.

    Args:
        loss: a loss of pairs or triplets.
        embedding_size: D.
        memory_size: M, how many rows the queue holds; a batch may not be larger.
        miner: which pairs of batch and queue count; None is all of them.

    Attributes:
        queue_idx: the slot that the next row enters.
        has_been_filled: whether every slot holds a row.

    Raises:
        ValueError: a loss that takes no references, or a size below 1.

    Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020.
    """

    loss: PairLoss
    embedding_size: int
    memory_size: int = 1024
    miner: Miner | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.loss, PairLoss) or self.loss.learns_references:
            raise ValueError(
                "CrossBatchMemory needs a loss that compares embeddings with references, got "
                f"{type(self.loss).__name__}"
            )
        for name in ("embedding_size", "memory_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.slots: Tensor
        self.slot_labels: Tensor
        self.reset_queue()

    def reset_queue(self) -> None:
        """Empties the queue."""
        # the queue is allocated by the first row that settles: a loss that a server will host needs none here
        self.register_buffer("slots", torch.zeros(0, self.embedding_size), persistent=False)
        self.register_buffer("slot_labels", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.entering: Entering | None = None
        self.queue_idx = 0
        self.has_been_filled = False

    def __len__(self) -> int:
        """How many rows the queue holds."""
        return self.memory_size if self.has_been_filled else self.queue_idx

    @property
    def nbytes(self) -> int:
        """The bytes that the queue takes."""
        entering = self.entering  # once: another thread may ask while a step is under way
        waiting = 0 if entering is None else entering.rows.nbytes + entering.labels.nbytes
        return self.slots.nbytes + self.slot_labels.nbytes + waiting

    @property
    def embedding_memory(self) -> Tensor:
        """`(M, D)`: the queue by slot, zeros where it holds no row yet."""
        self._settle()
        # what is not allocated yet has no dtype yet, and looking at it does not give it one
        return self.slots if len(self.slots) else self.slots.new_zeros(self.memory_size, self.embedding_size)

    @property
    def label_memory(self) -> Tensor:
        """`(M,)`: the labels by slot."""
        self._settle()
        return self.slot_labels if len(self.slots) else self.slot_labels.new_zeros(self.memory_size)

    @property
    def curr_batch_idx(self) -> Tensor:
        """The slots that the last batch entered."""
        last = self.entering
        return torch.zeros(0, dtype=torch.int64) if last is None else self._slots_of(last)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Indices | None = None,
        enqueue_mask: Tensor | None = None,
        enqueue_idx: Tensor | None = None,
    ) -> Tensor:
        """The loss of the batch against the queue, a scalar.

        Args:
            embeddings: `(B, D)` floats, and labels: `(B,)`.
            indices_tuple: `(a, p, n)` or `(a1, p, a2, n)` within the batch, in addition to all other pairs.
            enqueue_mask: `(B,)` bool: these rows only enter the queue, the others are only compared with it
                (as in MoCo, where keys enter and queries are compared).
            enqueue_idx: `(K,)` int64: the same, as positions.

        Raises:
            ValueError: a shape that does not fit, more rows than slots, or arguments that exclude each other.
            NonFiniteError: NaN or infinity among the embeddings.
        """
        staged = self.stage(embeddings, labels, indices_tuple, enqueue_mask, enqueue_idx)
        staged.commit()
        return staged.loss

    def stage(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Indices | None = None,
        enqueue_mask: Tensor | None = None,
        enqueue_idx: Tensor | None = None,
    ) -> Staged:
        self._check(embeddings, labels)
        embeddings = widened(embeddings)
        labels = labels.to(embeddings.device)
        mask = self._mask(embeddings, indices_tuple, enqueue_mask, enqueue_idx)
        self._settle()
        rows, row_labels = (embeddings, labels) if mask is None else (embeddings[mask], labels[mask])
        entering = self._entering(rows, row_labels)
        references = self._references(entering)
        if mask is not None:
            embeddings, labels = embeddings[~mask], labels[~mask]
        own = self._slots_of(entering) if mask is None else None
        pairs = self._pairs(embeddings, labels, references, own, indices_tuple)
        loss = self.regularized(self.loss.compare(embeddings, references, pairs), embeddings)
        return Staged(loss, lambda: self._enter(entering))

    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int | None = None) -> None:
        """Enters rows into the queue without comparing them: `(N, D)` and `(N,)`."""
        self._check(embeddings, labels)
        self._settle()
        self._enter(self._entering(embeddings, labels))

    def _check(self, embeddings: Tensor, labels: Tensor | None) -> None:
        check_batch(embeddings, labels)
        if labels is None:
            raise ValueError("a memory needs labels: they say what the rows in it are positives of")
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings have dimension {embeddings.shape[1]}, but the memory was built with "
                f"embedding_size={self.embedding_size}"
            )
        check_finite(embeddings)
        if labels.is_floating_point():
            raise ValueError(f"labels that enter a memory must be integers, got {labels.dtype}")

    def _entering(self, rows: Tensor, labels: Tensor) -> Entering:
        """The rows at the slots that they will enter, in the queue's dtype: that of the first batch, float32 at least.

        They are copies, since the caller may go on to write to his own.
        """
        if len(rows) > self.memory_size:
            raise ValueError(
                f"{len(rows)} rows do not fit a memory of {self.memory_size}: raise memory_size, or enqueue fewer"
            )
        dtype = self.slots.dtype if len(self.slots) else torch.promote_types(rows.dtype, torch.float32)
        with torch.inference_mode(False):
            kept = labels.detach().to(rows.device, torch.int64, copy=True)
            return Entering(rows.detach().to(dtype, copy=True), kept, self.queue_idx)

    def _pairs(
        self, embeddings: Tensor, labels: Tensor, references: References, own: Tensor | None, indices: Indices | None
    ) -> Pairs:
        assert references.labels is not None
        pairs: Pairs = LabelledPairs(labels, references.labels, own)
        if self.miner is not None:
            # the miner sees each anchor's own row as a positive, as in PML; the loss does not
            with full_precision(embeddings.device):
                mined = self.miner.mine(embeddings, references, LabelledPairs(labels, references.labels))
            pairs = MinedPairs(pairs, mined.keep)
        if indices is not None and own is not None:
            a1, p, a2, n = as_pairs(indices, embeddings.device)
            for kind, index in (("positive", p), ("negative", n)):
                check_indices(kind, index, len(embeddings))
            once = not self.loss.counts_repeats
            shape = (len(embeddings), len(references))
            # the batch's rows are where they entered the queue
            pairs = JoinedPairs(pairs, ListedPairs((a1, own[p], a2, own[n]), shape, once), once)
        return pairs

    def _mask(
        self, embeddings: Tensor, indices: Indices | None, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor | None:
        if positions is not None:
            if mask is not None:
                raise ValueError("enqueue_mask and enqueue_idx say the same: pass one of them")
            mask = enqueue_mask_of(positions, len(embeddings)).to(embeddings.device)
        if mask is None:
            return None
        if indices is not None:
            raise ValueError("indices_tuple and enqueue_mask are mutually exclusive")
        if mask.shape != embeddings.shape[:1] or mask.is_floating_point():
            raise ValueError(
                f"enqueue_mask must be ({len(embeddings)},) booleans, got {tuple(mask.shape)} {mask.dtype}"
            )
        return mask.to(embeddings.device, torch.bool)

    def _slots_of(self, entering: Entering) -> Tensor:
        step = torch.arange(len(entering.rows), device=entering.rows.device)
        return (entering.start + step) % self.memory_size

    def _references(self, entering: Entering) -> References:
        """The queue as it will be once `entering` is in it, by slot, without writing it."""
        new, first = entering.rows, entering.start
        last, filled = first + len(new), len(self)
        kept = self.slots.to(new.device)
        around = max(last - self.memory_size, 0)  # rows that wrap to the front
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
        return References(tuple(piece for piece in pieces if len(piece)) or (new,), labels)

    def _enter(self, entering: Entering) -> None:
        """Makes `entering` part of the queue: references and integers only, so it cannot fail half-way."""
        last = entering.start + len(entering.rows)
        self.entering = entering if len(entering.rows) else None
        self.queue_idx = last % self.memory_size
        self.has_been_filled = self.has_been_filled or last >= self.memory_size

    def _settle(self) -> None:
        """Writes the rows that wait into their slots. They already count, so doing it twice changes nothing."""
        entering = self.entering
        if entering is None:
            return
        with torch.inference_mode(False):  # the queue outlives the mode that its rows came in
            if not len(self.slots):
                self._allocate(entering.rows)
            if self.slots.device != entering.rows.device:  # after a load from a checkpoint, for one
                self.slots = self.slots.to(entering.rows.device)
            self.slot_labels = self.slot_labels.to(self.slots.device)
            slots = self._slots_of(entering)
            self.slots[slots] = entering.rows.to(self.slots)
            self.slot_labels[slots] = entering.labels
        self.entering = None

    def _allocate(self, like: Tensor) -> None:
        """An empty queue where `like` is, and of its dtype, which is then fixed."""
        slots = torch.zeros(self.memory_size, self.embedding_size, dtype=like.dtype, device=like.device)
        self.slot_labels = torch.zeros(self.memory_size, dtype=torch.int64, device=like.device)
        self.slots = slots

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "embedding_memory"] = self.embedding_memory.detach()
        destination[prefix + "label_memory"] = self.label_memory
        destination[prefix + "queue_idx"] = torch.tensor(self.queue_idx)
        destination[prefix + "has_been_filled"] = torch.tensor(self.has_been_filled)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        names = ("embedding_memory", "label_memory", "queue_idx", "has_been_filled")
        given = {name: state_dict.get(prefix + name) for name in names}
        super()._load_from_state_dict(
            {k: v for k, v in state_dict.items() if k[len(prefix) :] not in names},
            prefix, metadata, strict, missing, *rest,
        )  # fmt: skip
        rows, labels, cursor, filled = given.values()
        absent = [prefix + name for name, value in given.items() if value is None]
        missing.extend(absent)
        if rows is None or labels is None or cursor is None or filled is None:
            if len(absent) < len(names):
                rest[-1].append(f"a queue cannot be restored without {', '.join(absent)}")
            return
        if not rows.is_floating_point() or labels.is_floating_point():
            rest[-1].append(f"{prefix}embedding_memory must hold floats and {prefix}label_memory integers")
            return
        if rows.shape != (self.memory_size, self.embedding_size):
            rest[-1].append(
                f"size mismatch for {prefix}embedding_memory: expected "
                f"{(self.memory_size, self.embedding_size)}, got {tuple(rows.shape)}"
            )
            return
        if not 0 <= int(cursor) < self.memory_size or labels.shape != rows.shape[:1]:
            rest[-1].append(f"{prefix}queue_idx and label_memory do not fit {self.memory_size} slots")
            return
        self.entering = None
        self.slots, self.slot_labels = rows.detach().clone(), labels.detach().clone()
        self.queue_idx, self.has_been_filled = int(cursor), bool(filled)


def enqueue_mask_of(positions: Tensor, batch: int) -> Tensor:
    """The bool mask, `(B,)`, that an `enqueue_idx` means.

    Raises:
        ValueError: a position outside the batch.
    """
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < batch:
        raise ValueError(
            f"enqueue_idx names rows {int(positions.min())} to {int(positions.max())}, but must stay within "
            f"0..{batch - 1}"
        )
    mask = torch.zeros(batch, dtype=torch.bool)
    mask[positions.cpu()] = True
    return mask
