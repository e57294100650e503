"""A batch as the arguments that a hosted loss takes."""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbank.checks import check_batch, check_finite
from gradbank.engine import widened
from gradbank.errors import InvalidRequest
from gradbank.losses.loss import Loss
from gradbank.memory import CrossBatchMemory
from gradbank.spec import Spec
from gradbank_server.sessions.batch import Batch


class Arguments(NamedTuple):
    """What a loss is called with: embeddings, other arguments by name, and which of both are to get a gradient."""

    embeddings: Tensor
    others: dict[str, Any]
    wanted: list[Tensor]


class Signature:
    """What a loss takes.

    Args:
        loss: the loss, and spec: what it was built from.
        device: where it computes.
    """

    def __init__(self, loss: Loss, spec: Spec, device: torch.device) -> None:
        self._spec, self._device = spec, device
        self._is_queue = isinstance(loss, CrossBatchMemory)
        taken = inspect.signature(loss.forward).parameters
        self._takes = set(taken)
        self._takes_any = any(each.kind == each.VAR_KEYWORD for each in taken.values())

    def arguments(self, batch: Batch) -> Arguments:
        """Those of a batch that has embeddings.

        Raises:
            InvalidRequest: an argument that the loss does not take.
            ValueError: a shape that does not fit.
            NonFiniteError: NaN or infinity among the embeddings.
        """
        assert batch.embeddings is not None  # else there is only news
        check_batch(batch.embeddings, batch.labels)
        check_finite(batch.embeddings)
        embeddings = self._leaf(batch.embeddings, batch.embeddings_need_gradient)
        others: dict[str, Any] = {"labels": self._here(batch.labels)}
        if self._is_queue and (batch.ref_emb is not None or batch.ref_labels is not None):
            raise InvalidRequest("a CrossBatchMemory compares with its queue: it takes no ref_emb or ref_labels")
        if batch.ref_labels is not None:
            others["ref_labels"] = self._here(batch.ref_labels)
        wanted = [embeddings] if batch.embeddings_need_gradient else []
        if batch.indices:
            others["indices_tuple"] = tuple(index.to(self._device) for index in batch.indices)
        if batch.enqueue_mask is not None:
            if not self._is_queue:
                raise InvalidRequest(f"enqueue_mask needs a CrossBatchMemory, and this is {self._spec.name}")
            others["enqueue_mask"] = self._here(batch.enqueue_mask)
        if batch.ref_emb is not None:
            check_batch(batch.ref_emb, batch.ref_labels, "ref_emb", "ref_labels")
            check_finite(batch.ref_emb, "ref_emb")
            others["ref_emb"] = self._leaf(batch.ref_emb, batch.ref_emb_needs_gradient)
            wanted += [others["ref_emb"]] if batch.ref_emb_needs_gradient else []
        for name, value in others.items():
            if value is not None and name not in self._takes and not self._takes_any:
                raise InvalidRequest(f"{self._spec.title()} takes no {name}")
        return Arguments(embeddings, others, wanted)

    def _here(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self._device)

    def _leaf(self, tensor: Tensor, needs_gradient: bool) -> Tensor:
        # wide, so that its gradient is: a trainer scales that before it narrows it
        return widened(tensor.to(self._device).detach()).requires_grad_(needs_gradient)
