"""The answer of a hosted loss: a number whose gradients came with it."""

from typing import Any

import torch
from torch import Tensor

from gradbank.engine import widened
from gradbank.engine.eager import is_batched, keep, kept, refuse_second_derivatives, scaled
from gradbank.remote.optimizer import RemoteOptimizer
from gradbank.v1 import step_pb2
from gradbank.wire import TensorReader


def gradients_of(output: step_pb2.StepOutput, data: Tensor) -> list[Tensor | None]:
    """Those at the embeddings and at the references, where they were asked for.

    Args:
        data: the bytes of the answer's tensors.
    """
    reader = TensorReader(data)
    gradients: list[Tensor | None] = [None, None]
    if output.HasField("embeddings_gradient"):
        gradients[0] = _wide(reader.take(output.embeddings_gradient), output.embeddings_gradient_exponent)
    if output.HasField("ref_emb_gradient"):
        gradients[1] = _wide(reader.take(output.ref_emb_gradient), output.ref_emb_gradient_exponent)
    reader.finish()
    return gradients


class Answered(torch.autograd.Function):
    """A loss whose gradients came with it."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        seen: tuple[RemoteOptimizer, int] | None,
        gradients: list[Tensor | None],
        embeddings: Tensor,
        ref_emb: Tensor | None,
        token: Tensor | None,
    ) -> Tensor:
        ctx.seen, inputs = seen, (embeddings, ref_emb)
        # as wide as they came: the scale that backward brings may be more than half precision holds
        keep(ctx, (g if g is None or x is None else g.to(x.device) for g, x in zip(gradients, inputs)))
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        made = scaled(kept(ctx), grad_output, owned=True)  # by an answer that nobody else reads
        of_embeddings, of_ref = (None if g is None else g.to(dtype) for g, dtype in zip(made, ctx.dtypes))
        of_token = None
        if ctx.seen is not None:
            optimizer, seq = ctx.seen
            if is_batched(grad_output):
                raise RuntimeError(
                    "a hosted loss with learnable weights takes one backward pass at a time: leave is_grads_batched out"
                )
            optimizer.saw(seq, float(grad_output))
            # the token counts: sums of scales may cancel. NaN of what is not finite, which an AMP scaler looks for
            of_token = (1 + 0 * grad_output).to(optimizer.token)
        return None, None, None, of_embeddings, of_ref, of_token


def _wide(gradient: Tensor, exponent: int) -> Tensor:
    """A gradient in the precision that it is computed with here."""
    gradient = widened(gradient)
    return gradient.mul_(2.0**exponent) if exponent else gradient
