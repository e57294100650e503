"""What a step is given, and what it answers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class OptimizerSpec(NamedTuple):
    """A class of `torch.optim` by name, and its keyword arguments."""

    name: str
    options: dict[str, Any]


class Backward(NamedTuple):
    """A backward pass through the loss of an earlier step: `scale` is the gradient that came down to it."""

    seq: int
    scale: float


class OptimizerStep(NamedTuple):
    """A step of the optimizer of a session's weights."""

    gradient_scale: float
    options: dict[str, Any]


class ZeroGradient(NamedTuple):
    """The accumulated gradient becomes zero."""


WeightEvent = Backward | OptimizerStep | ZeroGradient


@dataclass(frozen=True)
class Batch:
    """What a trainer sends: the arguments of the loss, and news of earlier steps.

    Attributes:
        embeddings: `(B, D)`; None if there is only news.
        labels: `(B,)`. ref_emb: `(M, D)`. ref_labels: `(M,)`; None if reference i is anchor i.
        indices: `(a, p, n)` or `(a1, p, a2, n)`. enqueue_mask: `(B,)` bool.
        weight_events: what was done with the losses of earlier steps, carried out before this one's is computed.
        resets_queue: whether the bank is to be emptied; only without embeddings.
        answered: the last step whose answer the trainer has, so that it will not ask for it again.
    """

    embeddings: Tensor | None = None
    labels: Tensor | None = None
    ref_emb: Tensor | None = None
    ref_labels: Tensor | None = None
    indices: tuple[Tensor, ...] = ()
    enqueue_mask: Tensor | None = None
    embeddings_need_gradient: bool = False
    ref_emb_needs_gradient: bool = False
    weights_need_gradient: bool = False
    weight_events: tuple[WeightEvent, ...] = ()
    resets_queue: bool = False
    answered: int = 0

    @property
    def compares(self) -> bool:
        """Whether there is anything to compute: not where all rows only enter the bank."""
        return self.embeddings is not None and (self.enqueue_mask is None or not bool(self.enqueue_mask.all()))


class Answer(NamedTuple):
    """What came of a step.

    Attributes:
        loss: a scalar of float32 or float64, and value: the same as a number.
        embeddings_gradient: `(B, D)`, and ref_emb_gradient: `(M, D)`, where they were asked for.
        bank_rows: rows in the bank after the step.
        statistics: what the loss and its parts wrote down of it, by the way to the part.
    """

    loss: Tensor
    value: float
    embeddings_gradient: Tensor | None
    ref_emb_gradient: Tensor | None
    bank_rows: int
    statistics: dict[str, float]

    @staticmethod
    def nothing(bank_rows: int) -> "Answer":
        return Answer(torch.zeros(()), 0.0, None, None, bank_rows, {})


class Outcome(NamedTuple):
    """An answer, whether it was stored from before, and how many seconds the step waited for its turn."""

    answer: Answer
    replayed: bool
    waited_s: float
