"""What a component may be made of: the modules among its arguments, as they are annotated."""

import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from torch import nn

_CONTAINERS = (list, tuple, dict, Sequence, Mapping)  # as arguments are annotated
_HELD = (list, tuple, Mapping, nn.ModuleList, nn.ModuleDict)  # as a component has them


class Part(NamedTuple):
    """An argument that is a module of one of some kinds; or that contains such, in a list or by names."""

    kinds: tuple[type[nn.Module], ...]
    is_many: bool


def check_part(cls: type, name: str, value: Any) -> None:
    """Refuses what cannot be the argument `name` of a component of class `cls`.

    Raises:
        TypeError: it is annotated as a module, and this is none of that kind.
    """
    part = _parts(cls).get(name)
    if part is None or value is None:
        return
    if part.is_many and isinstance(value, _HELD):
        given = list(value.values() if isinstance(value, Mapping | nn.ModuleDict) else value)
    else:
        given = [value]
    for each in given:
        if each is not None:
            check_is(part.kinds, each, f"{cls.__name__}: {name}")


def check_is(kinds: tuple[type, ...], value: Any, name: str) -> None:
    """Refuses what is none of these kinds.

    Raises:
        TypeError: the message says what to give as `name`.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be a {' or '.join(kind.__name__ for kind in kinds)}, got {_told(value)}")


def _told(value: Any) -> str:
    """What was given, and what to give instead."""
    if isinstance(value, type):
        return f"the class {value.__name__}: give it an object, {value.__name__}(...)"
    if isinstance(value, nn.Module):
        cls = type(value)
        told = f"{cls.__module__}.{cls.__qualname__}"
        theirs = cls.__module__.startswith("pytorch_metric_learning.")
        return f"{told}: gradbank.from_pml(...) makes it one" if theirs else told
    return repr(value)[:80]


@cache
def _parts(cls: type) -> dict[str, Part]:
    try:
        hints = get_type_hints(cls)
    except Exception:  # an annotation is for type checkers, and need not mean anything here
        return _parts(cls.__mro__[1])
    found = {name: _part(hint) for name, hint in hints.items()}
    return {name: part for name, part in found.items() if part is not None}


def _part(hint: Any) -> Part | None:
    """The part that is annotated so; None if it may be something else."""
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds, is_many = set[Any](), False
    for choice in choices:
        if get_origin(choice) in _CONTAINERS:
            inner = _part(get_args(choice)[-1])  # of a dictionary, the values
            if inner is None:
                return None
            kinds, is_many = kinds | set(inner.kinds), True
        elif isinstance(choice, type) and issubclass(choice, nn.Module):
            kinds.add(choice)
        elif choice is not types.NoneType:
            return None
    return Part(tuple(kinds), is_many) if kinds else None
