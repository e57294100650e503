"""A queue of past embeddings to compare each batch with."""

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradbank.bank import SAVED_BY_PML, STATE, Bank
from gradbank.checks import check_batch, check_counts, check_finite
from gradbank.comparison import compared, compares
from gradbank.component import component, components
from gradbank.engine import Indices, widened
from gradbank.locks import lock_of
from gradbank.losses.base import BaseMetricLossFunction
from gradbank.losses.loss import Loss, Staged
from gradbank.miners.base import Miner
from gradbank.mismatch import Mismatch
from gradbank.overrides import is_ours, refuse_uncalled
from gradbank.recorder import Recorder


@component
class CrossBatchMemory(Loss, Recorder):
    """Computes `loss` between each batch and the last `memory_size` embeddings, the batch included.

    Each call first enters the batch into the queue, overwriting the oldest rows, then compares it with the whole
    queue; an anchor's own row is not its positive (but for `NCALoss`). Rows in the queue get no gradient.

    A call that fails leaves the queue as it was. It has no statistics of its own: its loss writes some, and so does a
    miner that lists what it takes. Those that list nothing here (of pairs, and `TripletMarginMiner`) count what they
    took with `collect_stats`.

    Args:
        loss: a loss of pairs or triplets.
        embedding_size: D.
        memory_size: M, how many rows the queue holds; a batch may not be larger.
        miner: which pairs of batch and queue count; None is all of them.

    Attributes:
        bank: the queue itself.

    Raises:
        ValueError: a loss that takes no references, or a size that is no whole number, at least 1.
        TypeError: what is no loss of pairs.

    Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020.
    """

    loss: BaseMetricLossFunction
    embedding_size: int
    memory_size: int = 1024
    miner: Miner | None = None

    remembers: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if is_ours(cls, "forward") and is_ours(cls, "stage"):
            refuse_uncalled(
                cls, ("create_indices_tuple", "add_to_memory"), "override forward as a whole, or give it a miner"
            )

    def __post_init__(self) -> None:
        if not compares(type(self.loss)):
            raise ValueError(
                "CrossBatchMemory needs a loss that compares embeddings with references, got "
                f"{type(self.loss).__name__}"
            )
        if not is_ours(type(self.loss), "forward"):
            warnings.warn(
                f"CrossBatchMemory compares by what {type(self.loss).__name__} is declared by, and does not call its "
                "forward: do in negatives, terms or compute_loss what that does",
                UserWarning,
                stacklevel=3,
            )
        check_counts(self, "embedding_size", "memory_size")
        self.bank = Bank(self.memory_size, self.embedding_size)

    @staticmethod
    def supported_losses() -> list[str]:
        """The names of all losses that it takes, those of one's own included that are components."""
        return [name for name, each in components().items() if compares(each)]

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        """Refuses, by ValueError, the name of a loss that it does not take."""
        if loss_name not in cls.supported_losses():
            raise ValueError(
                f"CrossBatchMemory does not support {loss_name}; it does {', '.join(cls.supported_losses())}"
            )

    def reset_queue(self) -> None:
        """Empties the queue, which is then of the size that `memory_size` and `embedding_size` say."""
        check_counts(self, "embedding_size", "memory_size")
        with lock_of(self):
            if (self.bank.capacity, self.bank.dimension) == (self.memory_size, self.embedding_size):
                self.bank.reset()
            else:
                self.bank = Bank(self.memory_size, self.embedding_size)

    def __len__(self) -> int:
        """How many rows the queue holds."""
        return len(self.bank)

    @property
    def queue_idx(self) -> int:
        """The slot that the next row enters."""
        return self.bank.cursor

    @queue_idx.setter
    def queue_idx(self, value: int) -> None:
        self._put("queue_idx", value)

    @property
    def has_been_filled(self) -> bool:
        """Whether every slot holds a row."""
        return self.bank.is_full

    @has_been_filled.setter
    def has_been_filled(self, value: bool) -> None:
        self._put("has_been_filled", value)

    @property
    def embedding_memory(self) -> Tensor:
        """`(M, D)`: the queue by slot, zeros where it holds no row yet."""
        return self.bank.rows()

    @embedding_memory.setter
    def embedding_memory(self, value: Tensor) -> None:
        self._put("embedding_memory", value)

    @property
    def label_memory(self) -> Tensor:
        """`(M,)`: the labels by slot."""
        return self.bank.labels()

    @label_memory.setter
    def label_memory(self, value: Tensor) -> None:
        self._put("label_memory", value)

    @property
    def curr_batch_idx(self) -> Tensor:
        """The slots that the last batch entered, until the next one comes."""
        return self.bank.last_slots()

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
        return self.carried_out(embeddings, labels, indices_tuple, enqueue_mask, enqueue_idx)

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
        labels = labels.to(embeddings.device, torch.int64)
        mask = self._mask(embeddings, indices_tuple, enqueue_mask, enqueue_idx)
        self.bank.settle()
        rows, row_labels = (embeddings, labels) if mask is None else (embeddings[mask], labels[mask])
        entering = self.bank.entering(rows, row_labels)
        references = self.bank.references(entering)
        if mask is not None:
            embeddings, labels = embeddings[~mask], labels[~mask]
        own = self.bank.slots_of(entering) if mask is None else None
        loss = self.loss.at_once(
            lambda rows, others: compared(self.loss, self.miner, rows, labels, others, own, indices_tuple),
            embeddings,
            references,
            self,
        )
        return Staged(loss, lambda: self.bank.enter(entering))

    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int | None = None) -> None:
        """Enters rows into the queue without comparing them: `(N, D)` and `(N,)`."""
        self._check(embeddings, labels)
        with lock_of(self):
            self.bank.settle()
            self.bank.enter(self.bank.entering(embeddings, labels))

    def _check(self, embeddings: Tensor, labels: Tensor | None) -> None:
        check_batch(embeddings, labels)
        if labels is None:
            raise ValueError("a memory needs labels: they say what the rows in it are positives of")
        if embeddings.shape[1] != self.bank.dimension:
            raise Mismatch(
                f"embeddings have dimension {embeddings.shape[1]}, but the memory was built with "
                f"embedding_size={self.bank.dimension}"
            )
        check_finite(embeddings)
        if labels.is_floating_point() and bool((labels != labels.to(torch.int64)).any()):
            raise ValueError("labels that enter a memory must be whole numbers below 2^63: it keeps them as int64")

    def _put(self, name: str, value: Any) -> None:
        with lock_of(self):
            last = self.bank._last
            self.bank.load({**self.bank.state(), name: torch.as_tensor(value)})
            self.bank._last = last

    def _mask(
        self, embeddings: Tensor, indices: Indices | None, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor | None:
        if positions is not None:
            if mask is not None:
                raise Mismatch("enqueue_mask and enqueue_idx say the same: pass one of them")
            mask = enqueue_mask_of(positions, len(embeddings)).to(embeddings.device)
        if mask is None:
            return None
        mask = torch.as_tensor(mask)
        if indices is not None:
            raise Mismatch("indices_tuple and enqueue_mask are mutually exclusive")
        if mask.shape != embeddings.shape[:1] or mask.dtype != torch.bool:
            raise Mismatch(f"enqueue_mask must be ({len(embeddings)},) booleans, got {tuple(mask.shape)} {mask.dtype}")
        return mask.to(embeddings.device)

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        """Those of torch; of this module alone the queue's too, which are none that a wrapper should average or
        broadcast, but which `torch.distributed.checkpoint` finds the names of by."""
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse:
            yield from ((f"{prefix}.{name}" if prefix else name, each) for name, each in self.bank.state().items())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: value for name, value in self.bank.state().items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, *rest: Any
    ) -> None:
        own = {name: state_dict[prefix + name] for name in STATE if prefix + name in state_dict}
        others = {key: value for key, value in state_dict.items() if key.removeprefix(prefix) not in STATE}
        super()._load_from_state_dict(others, prefix, metadata, strict, missing, *rest)
        if own.keys() != set(SAVED_BY_PML):
            missing.extend(prefix + name for name in STATE if name not in own)
        if not own:
            return
        try:
            self.bank.load(own)
        except ValueError as error:
            rest[-1].append(f"{prefix.removesuffix('.') or 'the memory'}: {error}")  # what torch raises at the end


def enqueue_mask_of(positions: Tensor, batch: int) -> Tensor:
    """The bool mask, `(B,)`, that an `enqueue_idx` means.

    Raises:
        ValueError: what is no list of integers, or a position outside the batch.
    """
    positions = torch.as_tensor(positions).cpu()
    kind = positions.dtype
    if positions.ndim != 1 or (len(positions) and (kind == torch.bool or kind.is_floating_point or kind.is_complex)):
        hint = ": a mask is given as enqueue_mask" if kind == torch.bool else ""
        raise ValueError(f"enqueue_idx must be (K,) integers, got {tuple(positions.shape)} {kind}{hint}")
    positions = positions.long()
    if len(positions) and not 0 <= int(positions.min()) <= int(positions.max()) < batch:
        raise ValueError(
            f"enqueue_idx names rows {int(positions.min())} to {int(positions.max())}, but must stay within "
            f"0..{batch - 1}"
        )
    mask = torch.zeros(batch, dtype=torch.bool)
    mask[positions] = True
    return mask
