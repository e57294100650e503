"""Modules that can cross the wire by name: a component's fields are its constructor's arguments."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, dataclass_transform

from torch import nn

C = TypeVar("C", bound="Component")


class Spec(NamedTuple):
    """What a component is built from, fit for the wire: its name, and its arguments with components as specs."""

    name: str
    arguments: dict[str, Any]

    def title(self) -> str:
        """The name, with that of the loss inside, as in `CrossBatchMemory(NTXentLoss)`."""
        inner = self.arguments.get("loss")
        return f"{self.name}({inner.title()})" if isinstance(inner, Spec) else self.name


_REGISTRY: dict[str, type["Component"]] = {}


class Component(nn.Module):
    """An `nn.Module` declared as a dataclass: what it was built from can be read off its fields."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Component":
        self = super().__new__(cls)
        nn.Module.__init__(self)  # the dataclass's __init__ assigns fields that are modules
        return self

    def arguments(self) -> dict[str, Any]:
        """The constructor arguments that build an equal component."""
        return {name: getattr(self, name) for name in argument_names(type(self))}

    def rebuilt(self: C) -> C:
        """A new component, and new ones within it, from the same arguments."""
        return type(self)(**{name: _rebuilt(value) for name, value in self.arguments().items()})

    def spec(self) -> Spec:
        """What a server needs to build an equal component.

        Raises:
            TypeError: a class that is not registered by `@component`, and so has no name on the wire.
        """
        if _REGISTRY.get(type(self).__name__) is not type(self):
            raise TypeError(f"{type(self).__name__} is not a registered component: decorate it with @component")
        sent = [each.name for each in argument_fields(type(self)) if is_sent(each)]
        return Spec(type(self).__name__, {name: _sent(getattr(self, name)) for name in sent})

    def extra_repr(self) -> str:
        shown = {k: v for k, v in self.arguments().items() if not isinstance(v, nn.Module) and v is not None}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


@dataclass_transform(field_specifiers=(dataclasses.field,))
def component(cls: type[C]) -> type[C]:
    """Makes `cls` a dataclass and registers its name, so that a server can be asked to build it.

    Raises:
        TypeError: another component has that name.
    """
    made = foundation(cls)
    known = _REGISTRY.setdefault(cls.__name__, made)
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TypeError(
            f"two components are called {cls.__name__}: one in {known.__module__}, one in {cls.__module__}; "
            "rename yours, since the wire knows components by name"
        )
    _REGISTRY[cls.__name__] = made
    return made


@dataclass_transform(field_specifiers=(dataclasses.field,))
def foundation(cls: type[C]) -> type[C]:
    """Makes `cls` a dataclass that components are written on; it has no name on the wire itself."""
    made = dataclasses.dataclass(eq=False, repr=False)(cls)
    for each in dataclasses.fields(made):  # type: ignore[arg-type]
        if each.init and each.name in made.__dict__:
            delattr(made, each.name)  # a default left on the class would hide a module assigned to the field
    return made


def _rebuilt(value: Any) -> Any:
    if isinstance(value, Component):
        return value.rebuilt()
    if isinstance(value, list | tuple):
        return type(value)(_rebuilt(item) for item in value)
    if isinstance(value, dict):
        return {key: _rebuilt(item) for key, item in value.items()}
    return value


def _sent(value: Any) -> Any:
    if isinstance(value, Component):
        return value.spec()
    if isinstance(value, list | tuple):
        return [_sent(item) for item in value]
    if isinstance(value, dict):
        return {key: _sent(item) for key, item in value.items()}
    return value


def argument_fields(cls: type[Component]) -> list["dataclasses.Field[Any]"]:
    """The fields that the constructor takes, positional ones first."""
    taken = [each for each in dataclasses.fields(cls) if each.init]  # type: ignore[arg-type]
    return sorted(taken, key=lambda each: bool(each.kw_only))


def is_sent(each: "dataclasses.Field[Any]") -> bool:
    """Whether the argument crosses the wire: all but those declared with `metadata={"wire": False}`."""
    return bool(each.metadata.get("wire", True))


def argument_names(cls: type[Component]) -> list[str]:
    return [each.name for each in argument_fields(cls)]


def components() -> dict[str, type[Component]]:
    """Every registered component class, by name."""
    return dict(sorted(_REGISTRY.items()))


def component_named(name: str) -> type[Component]:
    """The component class called `name`.

    Raises:
        ValueError: there is none; the message names the closest.
    """
    if name not in _REGISTRY:
        raise ValueError(f"no component is named {name!r}{did_you_mean(name, _REGISTRY)}")
    return _REGISTRY[name]


def did_you_mean(word: str, known: Iterable[str], listing: Callable[[Iterable[str]], str] = ", ".join) -> str:
    """The end of a sentence that refuses `word`: the closest known word, or all of them."""
    words = sorted(known)
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {listing(words)}"
