"""The arguments of a component's constructor, which are its fields: their defaults, and how they are held and told."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def argument_fields(cls: type) -> list["dataclasses.Field[Any]"]:
    """The fields that the constructor takes, positional ones first."""
    taken = [each for each in dataclasses.fields(cls) if each.init]
    return sorted(taken, key=lambda each: bool(each.kw_only))


def is_sent(each: "dataclasses.Field[Any]") -> bool:
    """Whether the argument crosses the wire: all but those declared with `metadata={"wire": False}`."""
    return bool(each.metadata.get("wire", True))


def default_of(each: "dataclasses.Field[Any]") -> Any:
    """What the argument is if it is left out; `dataclasses.MISSING` if it must be given."""
    factory = each.metadata.get("default_factory")
    return each.default if factory is None else factory()


def argument_names(cls: type) -> list[str]:
    return [each.name for each in argument_fields(cls)]


@functools.cache
def field_of(cls: type, name: str) -> "dataclasses.Field[Any] | None":
    """The field of a class, or of any that it is written on: what is no dataclass names its first base's only."""
    every = (vars(each).get("__dataclass_fields__", {}) for each in cls.__mro__)
    return next((fields[name] for fields in every if name in fields), None)


def default_method(cls: type, name: str) -> Callable[..., Any] | None:
    """The method that gives an argument its default, unless that is what its field says anyhow."""
    method: Callable[..., Any] | None = getattr(cls, f"get_default_{name}", None)
    return None if getattr(method, "of_field", False) else method


def default_getter(name: str) -> Any:
    """A method that gives an argument the default that its field has, for `super()` of one that gives another."""

    def get_default(self: object) -> Any:
        return made_by_default(type(self), name)

    get_default.__doc__ = f"The {name} where none is given."
    get_default.of_field = True  # type: ignore[attr-defined]  # see `default_method`
    return get_default


def made_by_default(cls: type, name: str) -> Any:
    """What the `default_factory` of an argument makes; None if it has none."""
    each = field_of(cls, name)
    factory = None if each is None else each.metadata.get("default_factory")
    return None if factory is None else factory()


def check_constructor(cls: type) -> None:
    """Refuses a class that would be built without some of its arguments."""
    taken = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]  # of this very class
    named = [each.name for each in taken if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    unknown = [name for name in named if name not in argument_names(cls)]
    if unknown:
        raise TypeError(
            f"{cls.__name__}.__init__ takes {', '.join(unknown)}, of which a server cannot be told: declare what it "
            f"takes as fields of the class (`{unknown[0]}: float = 1.0`), and do the rest in __post_init__"
        )


def check_not_learned(cls: type, arguments: dict[str, Any]) -> None:
    """Refuses what a server would take for a number."""
    for name, value in arguments.items():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(each, Tensor) and each.requires_grad for each in items):
            raise TypeError(
                f"{name} of {cls.__name__} is learned, and a server would have it as a number and no gradient of it: "
                f"give the number (as in {name}.detach()), or learn it with a loss in this process"
            )


def held(value: Any) -> Any:
    """An argument as the component holds it: what contains modules is a module."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    if not any(isinstance(item, nn.Module) for item in items):
        return value
    try:
        return nn.ModuleDict(value) if isinstance(value, Mapping) else nn.ModuleList(value)
    except (KeyError, TypeError) as error:  # a name that no attribute can have, or modules mixed with something else
        raise ValueError(f"components are given in a list, or by names: {error.args[0]!s}") from None


def as_given(value: Any) -> Any:
    """An argument as the constructor takes it: the reverse of `held`."""
    if isinstance(value, nn.ModuleDict):
        return dict(value.items())
    return list(value) if isinstance(value, nn.ModuleList) else value
