"""Which tensors of a component get a gradient: its weights, and arguments that are learned."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradbank.arguments import argument_fields, argument_names
from gradbank.component import Component
from gradbank.distances import Distance
from gradbank.engine import at_once, using
from gradbank.locks import lock_of
from gradbank.overrides import is_ours

Place = tuple[Any, Any, Tensor]  # what has it, a dictionary or a list, and under which name or number

_BASES = ("gradbank.losses.pair", "gradbank.distances.base")
_FORMULAS = ("negatives", "terms", "compute_mat")  # which take arguments for numbers in tiles, if they are ours


def learned_at_once(
    whole: nn.Module, call: Callable[[tuple[Tensor, ...]], Any], inputs: tuple[Tensor, ...], owned: bool = False
) -> Any:
    """`engine.at_once`, with the gradients of all that is learned of a component."""

    def untiled(inputs: tuple[Tensor, ...]) -> Any:
        with using("dense"):
            return call(inputs)

    chosen = untiled if torch.is_grad_enabled() and _learns_in_tiles(whole) else call
    weights = [each for each in whole.parameters() if each.requires_grad and each.is_leaf]
    if not any(_others(whole)):
        made = at_once(chosen, inputs, weights, owned)
        _detach_new(whole, [])
        return made
    with lock_of(whole):  # or another thread would take a leaf that stands in for what it stands in for
        places = list(_others(whole))
        others = {id(each): each for _, _, each in places}.values()
        made = at_once(chosen, inputs, [*weights, *others], owned, partial(_standing_in, places))
        _detach_new(whole, places)
        return made


def learned_arguments(whole: nn.Module) -> list[Tensor]:
    """Arguments, of a component and of those within it, that require a gradient: a temperature that is a parameter, or
    made of one, as in `loss_fn.temperature = log_t.exp()`. Not those of a formula of one's own."""
    found: list[Tensor] = []
    for part in whole.modules():
        held = (*part._buffers.items(), *part._parameters.items())
        learned = {name: each for name, each in held if each is not None and each.requires_grad}
        if learned and isinstance(part, Component):
            kind = type(part)
            given = {each.name for each in argument_fields(kind) if not each.metadata.get("weight")}
            formulas = [name for name in _FORMULAS if hasattr(kind, name)]
            known = all(is_ours(kind, name) for name in formulas) or any(_is_built_in(kind, name) for name in formulas)
            found += [
                each
                for name, each in learned.items()
                if name in given and (known or not isinstance(each, nn.Parameter))
            ]
    return found


def _learns_in_tiles(whole: nn.Module) -> bool:
    """Whether something is learned that a tile, which is differentiated by its embeddings, would keep to itself."""
    for part in whole.modules():
        if any(each is not None and each.requires_grad for each in part._buffers.values()):
            return True
        if any(hasattr(type(part), name) for name in _FORMULAS) and any(_one_by_one(part)):
            return True
        learns = isinstance(part, Distance) and (part.parameters_made or part._modules)  # if it has what it could learn
        if learns and (any(each.requires_grad for each in part.parameters()) or any(_others(part))):
            return True
    return bool(learned_arguments(whole))


def _others(whole: nn.Module) -> Iterator[Place]:
    """Where the tensors are that are learned and no parameters: arguments, and what was put in place of a parameter, as
    tied weights are, and those that FSDP gathers."""
    for part in whole.modules():
        for name, each in part._buffers.items():
            if each is not None and each.requires_grad:
                yield part._buffers, name, each
        for name, each in part._parameters.items():  # of `torch.func.functional_call`, what is made of something else
            if each is not None and each.requires_grad and not each.is_leaf:
                yield part._parameters, name, each
        if isinstance(part, Component):  # which may keep a loss to look at, so not all that it has
            for name in part.parameters_made:
                held = part.__dict__.get(name)
                if isinstance(held, Tensor) and held.requires_grad:
                    yield part.__dict__, name, held
            yield from _one_by_one(part)


def _one_by_one(part: nn.Module) -> Iterator[Place]:
    """What is learned of the arguments of a component that are lists or dictionaries."""
    if not isinstance(part, Component):
        return
    for name in _arguments(type(part)):  # type: ignore[arg-type]  # mypy asks a class for its instances' hash
        held = part.__dict__.get(name)
        if isinstance(held, list | dict):
            for key, each in held.items() if isinstance(held, dict) else enumerate(held):
                if isinstance(each, Tensor) and each.requires_grad:
                    yield held, key, each


def _detach_new(whole: nn.Module, before: list[Place]) -> None:
    """Of what a call wrote to its component the graph is spent: the next one is not to take it for learned."""
    known = {id(each) for _, _, each in before}
    for store, name, each in list(_others(whole)):
        if id(each) not in known:
            store[name] = each.detach()


@functools.cache
def _arguments(kind: type[Component]) -> list[str]:
    return argument_names(kind)


def _is_built_in(kind: type[Component], formula: str) -> bool:
    """Whether a formula is that of a component of ours, and not that of what these are written on, which has none."""
    owner = next(each for each in kind.__mro__ if formula in vars(each))
    return is_ours(kind, formula) and owner.__module__ not in _BASES


@contextmanager
def _standing_in(places: list[Place]) -> Iterator[dict[int, Tensor]]:
    """Leaves in place of tensors, by the ids of these: what one is made of may be learned too, and gets its gradient
    once."""
    made: dict[int, Tensor] = {}
    try:
        for store, name, each in places:
            store[name] = made.setdefault(id(each), each.detach().requires_grad_())
        yield made
    finally:
        for store, name, each in places:
            if store[name] is made.get(id(each)):  # else it was interrupted before, or the call wrote something else
                store[name] = each
