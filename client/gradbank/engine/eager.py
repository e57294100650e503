"""A loss whose gradients are computed with it.

What the loss was computed from may change before `backward` (a bank does, with the next call), and a server has to
send the gradients along anyway: so they are computed at once, and `backward` multiplies them by what came down.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Evaluation = Callable[[tuple[Tensor, ...], tuple[bool, ...]], tuple[Tensor, list[Tensor | None]]]


def eager(evaluation: Evaluation, inputs: tuple[Tensor, ...], owned: bool = False) -> Tensor:
    """The value of `evaluation(inputs, needed)`, which also gives the gradient of each input that needs one.

    Args:
        owned: whether no gradient shares its memory with anything: then a backward pass that is the last writes to
            them, and those of large weights are not held twice.
    """
    if not torch.is_grad_enabled():  # then autograd would still say that gradients are needed
        inputs = tuple(each.detach() for each in inputs)
    return _Eager.apply(evaluation, owned, *inputs)  # type: ignore[no-untyped-call, no-any-return]


def at_once(
    whole: Callable[[tuple[Tensor, ...]], Tensor],
    inputs: tuple[Tensor, ...],
    learned: Sequence[Tensor] = (),
    owned: bool = False,
) -> Tensor:
    """The value of `whole(inputs)`, with its gradients computed now: those of the inputs, and of what is learned.

    What comes down in the backward pass then multiplies all of each gradient at its end, as it does that of a server:
    the two are equal to the last bit.
    """
    return eager(by_autograd(whole, len(inputs)), (*inputs, *learned), owned)


def by_autograd(whole: Callable[[tuple[Tensor, ...]], Tensor], copied: int) -> Evaluation:
    """The evaluation that differentiates `whole(inputs)` by autograd.

    Args:
        copied: how many of the inputs `whole` takes from its argument; the others it has by itself, as a loss has its
            parameters.
    """

    def evaluation(inputs: tuple[Tensor, ...], needed: tuple[bool, ...]) -> tuple[Tensor, list[Tensor | None]]:
        leaves = tuple(each.detach().requires_grad_(need) for each, need in zip(inputs[:copied], needed))
        wanted = [leaf for leaf, need in zip((*leaves, *inputs[copied:]), needed) if need]
        with torch.set_grad_enabled(bool(wanted)):
            value = whole(leaves)
        if not value.requires_grad:  # nothing of the inputs reached the loss, or nothing is wanted
            return value, [torch.zeros_like(leaf) for leaf in wanted]
        made = torch.autograd.grad(value, wanted, allow_unused=True)
        own = sum(needed[:copied])
        return value.detach(), [
            torch.zeros_like(w) if g is None and i < own else g for i, (w, g) in enumerate(zip(wanted, made))
        ]

    return evaluation


def refuse_second_derivatives() -> None:
    """To be called by a backward pass, in which gradients are recorded only if it is to be differentiated itself.

    Raises:
        RuntimeError: it is.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("a loss computes its gradient, but no gradients of gradients: leave create_graph out")


def scaled(gradients: Iterable[Tensor | None], grad_output: Tensor, owned: bool) -> list[Tensor | None]:
    """What a backward pass gives: each gradient, times what came down.

    Args:
        owned: whether no gradient shares its memory with anything: then a backward pass that is the last writes to
            them, and may hand them on as they are.
    """
    batched = torch._C._functorch.is_batchedtensor(grad_output)  # which may not be looked at, nor written from
    if owned and not batched and not torch._C._autograd._get_current_graph_task_keep_graph():
        if grad_output.device.type == "cpu" and grad_output == 1:
            return list(gradients)
        return [None if each is None else each.mul_(grad_output.to(each)) for each in gradients]
    return [None if each is None else each * grad_output.to(each) for each in gradients]


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, evaluation: Evaluation, owned: bool, *inputs: Tensor) -> Tensor:
        value, gradients = evaluation(inputs, ctx.needs_input_grad[2:])
        ctx.owned = owned
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        made = iter(scaled(ctx.saved_tensors, grad_output, ctx.owned))
        return None, None, *(next(made) if need else None for need in ctx.needs_input_grad[2:])
