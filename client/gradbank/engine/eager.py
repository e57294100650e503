"""A loss whose gradients are computed with it.

What the loss was computed from may change before `backward` (a bank does, with the next call), and a server has to
send the gradients along anyway: so they are computed at once, and `backward` multiplies them by what came down.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gradbank.engine.precision import full_precision
from gradbank.engine.surroundings import own_graph

Evaluation = Callable[[tuple[Tensor, ...], tuple[bool, ...]], tuple[Tensor, list[Tensor | None]]]


def eager(evaluation: Evaluation, inputs: tuple[Tensor, ...], owned: bool = False) -> Tensor:
    """The value of `evaluation(inputs, needed)`, which also gives the gradient of each input that needs one.

    Args:
        owned: whether no gradient shares its memory with anything: then a backward pass that is the last writes to
            them, and those of large weights are not held twice.

    Raises:
        RuntimeError: a transform of `torch.func`, which wants to differentiate it, or forward-mode differentiation.
    """
    refuse_transforms(inputs)
    if not torch.is_grad_enabled():
        return evaluation(inputs, (False,) * len(inputs))[0]
    return _Eager.apply(evaluation, owned, *inputs)  # type: ignore[no-untyped-call, no-any-return]


def at_once(
    whole: Callable[[tuple[Tensor, ...]], Tensor],
    inputs: tuple[Tensor, ...],
    learned: Sequence[Tensor] = (),
    owned: bool = False,
    standing_in: Callable[[], AbstractContextManager[Mapping[int, Tensor]]] = lambda: nullcontext({}),
) -> Tensor:
    """The value of `whole(inputs)`, with its gradients computed now: those of the inputs, and of what is learned.

    Args:
        standing_in: has leaves stand in for some of what is learned, while that is computed with; gives them by the
            ids of those.

    What comes down in the backward pass then multiplies all of each gradient at its end, as it does that of a server:
    the two are equal to the last bit.
    """
    # a tensor that is given twice, as a batch is that is compared with itself, is one leaf
    distinct = list({id(each): each for each in inputs}.values())
    copied, places = len(distinct), [next(i for i, one in enumerate(distinct) if one is each) for each in inputs]

    def evaluation(given: tuple[Tensor, ...], needed: tuple[bool, ...]) -> tuple[Tensor, list[Tensor | None]]:
        own = [each.detach().requires_grad_(need) for each, need in zip(given[:copied], needed)]
        with standing_in() as leaves_of:
            leaves = [*own, *(leaves_of.get(id(each), each) for each in given[copied:])]
            wanted = [leaf for leaf, need in zip(leaves, needed) if need]
            with torch.set_grad_enabled(bool(wanted)):
                # views, for trackers of modules hook what these are called with, which a leaf that is asked for is not
                seen = [leaf.view_as(leaf) for leaf in own]
                value = whole(tuple(seen[place] for place in places))
        made: Sequence[Tensor | None] = [None] * len(wanted)
        if value.requires_grad:  # else nothing of the inputs reached the loss, or nothing is wanted
            with full_precision(value.device):  # autocast is meant for the forward pass
                made = torch.autograd.grad(value, wanted, allow_unused=True)
        of_inputs = sum(needed[:copied])
        zeros = (torch.zeros_like(leaf) if gradient is None else gradient for leaf, gradient in zip(wanted, made))
        return value.detach(), [*islice(zeros, of_inputs), *made[of_inputs:]]

    return eager(evaluation, (*distinct, *learned), owned)


def refuse_transforms(inputs: Iterable[Tensor]) -> None:
    """To be called before a loss is computed whose gradients are computed with it.

    Raises:
        RuntimeError: somebody else wants to differentiate it, by `torch.func` or forwards.
    """
    level = torch.autograd.forward_ad._current_level  # below 0 is none
    tangents = level >= 0 and any(torch._VF._unpack_dual(each, level)[1] is not None for each in inputs)
    if tangents or torch._C._are_functorch_transforms_active():
        what = "forward-mode differentiation" if tangents else "torch.func"
        raise RuntimeError(f"a loss computes its gradient itself: call backward or torch.autograd.grad, not {what}")


def refuse_second_derivatives() -> None:
    """To be called by a backward pass, in which gradients are recorded only if it is to be differentiated itself.

    Raises:
        RuntimeError: it is.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("a loss computes its gradient, but no gradients of gradients: leave create_graph out")


def is_batched(grad_output: Tensor) -> bool:
    """Whether it is several at once: then it may not be looked at, nor written from."""
    functorch = torch._C._functorch
    return bool(functorch.is_batchedtensor(grad_output) or functorch.is_legacy_batchedtensor(grad_output))


def scaled(gradients: Iterable[Tensor | None], grad_output: Tensor, owned: bool) -> list[Tensor | None]:
    """What a backward pass gives: each gradient, times what came down.

    Args:
        owned: whether no gradient shares its memory with anything: then a backward pass that is the last writes to
            them, and may hand them on as they are.
    """
    if owned and not is_batched(grad_output) and not torch._C._autograd._get_current_graph_task_keep_graph():
        if grad_output.device.type == "cpu" and grad_output.item() == 1:
            return list(gradients)
        return [None if each is None else each.mul_(grad_output.to(each)) for each in gradients]
    return [None if each is None else each * grad_output.to(each) for each in gradients]


def keep(ctx: Any, gradients: Iterable[Tensor | None]) -> None:
    """Leaves gradients for the backward pass. `save_for_backward` would have `torch.utils.checkpoint` drop them, and
    compute the loss once more: with a queue, in which the batch is by then, that is another loss."""
    ctx.gradients = list(gradients)


def kept(ctx: Any) -> list[Tensor | None]:
    """The gradients that were left; a backward pass that is the last one takes them away.

    Raises:
        RuntimeError: they are gone.
    """
    made: list[Tensor | None] | None = ctx.gradients
    if made is None:
        raise RuntimeError(
            "Trying to backward through the graph a second time: the gradients of this loss were freed by the first, "
            "unless that is called with retain_graph=True"
        )
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.gradients = None
    return made


@contextmanager
def _unhooked(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Keeps the hooks of leaves from gradients that are computed on the way: they are for those of `backward`."""
    held = {id(each): (each, each._backward_hooks) for each in tensors if each.is_leaf and each._backward_hooks}
    try:
        for each, _ in held.values():
            each._backward_hooks = None
        yield
    finally:
        for each, hooks in held.values():
            each._backward_hooks = hooks


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, evaluation: Evaluation, owned: bool, *inputs: Tensor) -> Tensor:
        with _unhooked(inputs), own_graph():
            value, gradients = evaluation(inputs, ctx.needs_input_grad[2:])
        ctx.owned = owned
        keep(ctx, gradients)
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        made = iter(scaled(kept(ctx), grad_output, ctx.owned))
        return None, None, *(next(made) if need else None for need in ctx.needs_input_grad[2:])
