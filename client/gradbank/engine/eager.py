"""A loss whose gradients are computed with it.

What the loss was computed from may change before `backward` (a bank does, with the next call), and a server has to
send the gradients along anyway: so they are computed at once, and `backward` multiplies them by what came down.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Evaluation = Callable[[tuple[Tensor, ...], tuple[bool, ...]], tuple[Tensor, list[Tensor]]]


def eager(evaluation: Evaluation, inputs: tuple[Tensor, ...]) -> Tensor:
    """The value of `evaluation(inputs, needed)`, which also gives the gradient of each input that needs one."""
    if not torch.is_grad_enabled():  # then autograd would still say that gradients are needed
        inputs = tuple(each.detach() for each in inputs)
    return _Eager.apply(evaluation, *inputs)  # type: ignore[no-untyped-call, no-any-return]


def by_autograd(whole: Callable[[tuple[Tensor, ...]], Tensor]) -> Evaluation:
    """The evaluation that differentiates `whole(inputs)` by autograd."""

    def evaluation(inputs: tuple[Tensor, ...], needed: tuple[bool, ...]) -> tuple[Tensor, list[Tensor]]:
        leaves = tuple(each.detach().requires_grad_(need) for each, need in zip(inputs, needed))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        with torch.set_grad_enabled(bool(wanted)):
            value = whole(leaves)
        if not value.requires_grad:  # nothing of the inputs reached the loss, or nothing is wanted
            return value, [torch.zeros_like(leaf) for leaf in wanted]
        made = torch.autograd.grad(value, wanted, allow_unused=True)
        return value.detach(), [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, made)]

    return evaluation


def refuse_second_derivatives() -> None:
    """To be called by a backward pass, in which gradients are recorded only if it is to be differentiated itself.

    Raises:
        RuntimeError: it is.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("a loss computes its gradient, but no gradients of gradients: leave create_graph out")


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, evaluation: Evaluation, *inputs: Tensor) -> Tensor:
        value, gradients = evaluation(inputs, ctx.needs_input_grad[1:])
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        gradients = iter(ctx.saved_tensors)
        return None, *(next(gradients) * grad_output if need else None for need in ctx.needs_input_grad[1:])
