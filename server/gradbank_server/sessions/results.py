"""What a step may come to: numbers that can be told, or a refusal."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradbank.checks import check_finite
from gradbank.errors import GradbankError, InvalidRequest, LimitExceeded, NonFiniteError
from gradbank.spec import Spec
from gradbank_server.sessions.batch import Answer
from gradbank_server.sessions.learner import is_out_of_memory

_NUMBERS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_number(loss: object, spec: Spec) -> None:
    """Refuses what could not be told once it is computed."""
    if not isinstance(loss, Tensor):
        raise InvalidRequest(
            f"a hosted loss gives one number, and the reducer of {spec.title()} gives {type(loss).__name__}: give it "
            "another one, or call the loss here"
        )
    if loss.numel() != 1 or loss.dtype not in _NUMBERS:
        raise InvalidRequest(
            f"a hosted loss gives one number, of {' or '.join(map(str, _NUMBERS))}, and {spec.title()} gives "
            f"{loss.dtype} of shape {tuple(loss.shape)}"
        )


def gradients_of(
    loss: Tensor, batch: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Of a loss at some tensors of a batch, zeros where it does not depend on them, and at weights, None there."""
    found: list[Tensor | None] = [None] * (len(batch) + len(weights))
    if found and loss.requires_grad:  # else nothing reached the loss
        found = list(torch.autograd.grad(loss, [*batch, *weights], allow_unused=True))
    return [torch.zeros_like(t) if g is None else g for t, g in zip(batch, found)], found[len(batch) :]


def check_result(answer: Answer, weight_gradients: list[Tensor | None]) -> None:
    """Refuses, by NonFiniteError, a loss or a gradient that is NaN or infinite."""
    hint = "nothing was changed. The embeddings are finite: look at the loss's temperature, scale or margin"
    if not math.isfinite(answer.value):
        raise NonFiniteError(f"the loss is {answer.value}; {hint}")
    for name, gradient in (("embeddings", answer.embeddings_gradient), ("ref_emb", answer.ref_emb_gradient)):
        if gradient is not None:
            check_finite(gradient, f"the gradient of {name}")
    for gradient in weight_gradients:
        if gradient is not None and not bool(gradient.isfinite().all()):
            raise NonFiniteError(f"the gradient of the loss's weights is not finite; {hint}")


def refusal_of(error: Exception) -> GradbankError | None:
    """The error that a trainer is told; None if it is a fault of ours."""
    if isinstance(error, GradbankError):
        return error
    if is_out_of_memory(error):
        return LimitExceeded("the step does not fit the device's memory; nothing was changed. Send smaller batches")
    return InvalidRequest(str(error)) if isinstance(error, ValueError) else None
