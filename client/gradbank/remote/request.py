"""A call of a hosted loss as it is sent."""

from typing import Any

import torch
from torch import Tensor

from gradbank.engine.eager import refuse_transforms
from gradbank.errors import InvalidRequest
from gradbank.memory import enqueue_mask_of
from gradbank.v1 import step_pb2, tensor_pb2
from gradbank.wire import describe, wire_dtype

Inputs = tuple[Tensor, Tensor | None]  # embeddings and ref_emb

_FEW = 4096  # numbers: of fewer, looking at them takes longer than sending them
_SENT = {"embeddings", "labels", "indices_tuple", "ref_emb", "ref_labels", "enqueue_mask", "enqueue_idx"}


def request_of(bound: dict[str, Any], wire: torch.dtype | None) -> tuple[step_pb2.StepInput, list[memoryview], Inputs]:
    """The message of a call, its payload, and the two tensors that may want a gradient.

    Args:
        bound: the call's arguments, by the names that the hosted loss has for them.
        wire: the dtype that embeddings and gradients are rounded to; None is not at all.

    Raises:
        InvalidRequest: an argument that cannot be sent.
    """
    for argument in bound.keys() - _SENT:
        raise InvalidRequest(f"{argument} cannot be sent to a server: call the loss here, or without it")
    embeddings, labels, ref_emb = bound["embeddings"], bound.get("labels"), bound.get("ref_emb")
    if not isinstance(embeddings, Tensor):
        raise InvalidRequest(f"embeddings must be a tensor, got {type(embeddings).__name__}")
    refuse_transforms(each for each in (embeddings, ref_emb) if isinstance(each, Tensor))
    # the wire cannot carry that two labels are one object, which says that reference i is anchor i
    ref_labels = None if bound.get("ref_labels") is labels else bound.get("ref_labels")
    payload: list[memoryview] = []
    step = step_pb2.StepInput()
    named = {
        "embeddings": _rounded("embeddings", embeddings, wire),
        "labels": narrowed(labels),
        "ref_emb": _rounded("ref_emb", ref_emb, wire),
        "ref_labels": narrowed(ref_labels),
    }
    for name, tensor in named.items():
        if tensor is not None:
            getattr(step, name).CopyFrom(_described(name, tensor, payload))
    for i, index in enumerate(_listed(bound.get("indices_tuple"))):
        step.indices.append(_described(f"indices_tuple[{i}]", narrowed(index), payload))
    mask = _mask(bound)
    if mask is not None:
        step.enqueue_mask.CopyFrom(_described("enqueue_mask", mask, payload))
    if torch.is_grad_enabled():
        step.embeddings_need_gradient = embeddings.requires_grad
        step.ref_emb_needs_gradient = ref_emb is not None and ref_emb.requires_grad
    if wire is not None:
        step.gradient_dtype = wire_dtype(wire)
    return step, payload, (embeddings, ref_emb)


def _rounded(name: str, rows: Any, wire: torch.dtype | None) -> Any:
    """The embeddings as they are sent."""
    if wire is None or not isinstance(rows, Tensor) or not rows.is_floating_point():
        return rows
    made = rows.detach().to(wire)
    if wire == torch.float16 and not made.isfinite().all() and rows.isfinite().all():
        raise InvalidRequest(
            f"{name} go up to {float(rows.detach().abs().max()):.3g}, and float16 to 65504: open the loss with "
            "wire=torch.bfloat16, or normalise them"
        )
    return made


def _listed(indices: Any) -> tuple[Any, ...]:
    """The tensors of an `indices_tuple`, which may be stacked, or be one alone."""
    if indices is None:
        return ()
    if isinstance(indices, Tensor) and indices.ndim == 1:
        return (indices,)
    if not isinstance(indices, Tensor | tuple | list) or not len(indices):
        raise InvalidRequest("indices_tuple must be a tuple of tensors, and not an empty one")
    return tuple(indices)


def _described(name: str, tensor: object, payload: list[memoryview]) -> tensor_pb2.Tensor:
    """The message of an argument, whose bytes are added to the payload."""
    if not isinstance(tensor, Tensor):
        raise InvalidRequest(f"{name} must be a tensor, got {type(tensor).__name__}")
    message, data = describe(tensor)
    payload.append(data)
    return message


def narrowed(values: Any) -> Any:
    """Labels or indices in a dtype that the wire has and that holds the same numbers, in half the bytes if it can."""
    if not isinstance(values, Tensor):
        return values
    if values.dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16):
        return values.int()
    if values.dtype in (torch.uint32, torch.uint64):
        return values.long()
    if values.dtype != torch.int64 or values.numel() < _FEW:
        return values
    least, most = values.aminmax()
    return values.int() if int(least) >= -(2**31) and int(most) < 2**31 else values


def _mask(bound: dict[str, Any]) -> Tensor | None:
    """The mask that `enqueue_mask` or `enqueue_idx` means."""
    mask = bound.get("enqueue_mask")
    positions = bound.get("enqueue_idx")
    if positions is None:
        return None if mask is None else torch.as_tensor(mask)
    if mask is not None:
        raise InvalidRequest("enqueue_mask and enqueue_idx say the same: pass one of them")
    try:
        return enqueue_mask_of(positions, len(bound["embeddings"]))
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
