"""Modules that can cross the wire by name: a component's fields are its constructor's arguments."""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, TypeVar, dataclass_transform

import numpy as np
import torch
from torch import Tensor, nn

from gradbank.overrides import is_ours
from gradbank.parts import check_part

C = TypeVar("C", bound="Component")


class Spec(NamedTuple):
    """What a component is built from, fit for the wire: its name, and its arguments with components as specs."""

    name: str
    arguments: dict[str, Any]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self.name == other.name and same(self.arguments, other.arguments)

    def __ne__(self, other: object) -> bool:  # that of a tuple would compare tensors by `!=`
        return not self == other

    def title(self) -> str:
        """The name, with that of the loss inside, as in `CrossBatchMemory(NTXentLoss)`."""
        inner = self.arguments.get("loss")
        return f"{self.name}({inner.title()})" if isinstance(inner, Spec) else self.name


_REGISTRY: dict[str, type["Component"]] = {}


class Component(nn.Module):
    """An `nn.Module` declared as a dataclass: what it was built from can be read off its fields.

    An argument that is None takes its default: what the method `get_default_<argument>` of its class returns, or else
    the field's `default_factory`. Lists and dictionaries of modules are submodules, and a tensor moves along with the
    component's weights. What is annotated as a component must be one of that kind; see `parts`.

    Attributes:
        parameters_made: the names of its own parameters, also of those that something else was put in place of.
    """

    parameters_made: ClassVar[tuple[str, ...]] = ()  # of the class; each object has its own

    def __new__(cls, *args: Any, **kwargs: Any) -> "Component":
        self = super().__new__(cls)
        nn.Module.__init__(self)  # the dataclass's __init__ assigns fields that are modules
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        each = _field(type(self), name)  # type: ignore[arg-type]  # mypy asks a class for its instances' hash
        if each is None or not each.init:
            super().__setattr__(name, value)
            return
        if value is None:
            factory = getattr(self, f"get_default_{name}", None)
            value = made_by_default(type(self), name) if factory is None else factory()
        check_part(type(self), name, value)
        value = _held(value)
        self._note_given(name, value)
        if type(value) is Tensor and name not in self._buffers and name not in self._parameters:
            self.__dict__.pop(name, None)  # what was there before, and was no tensor
            self.register_buffer(name, value, persistent=False)  # it is of the spec, and not of the state
        else:
            if name in self._buffers and not isinstance(value, Tensor):
                delattr(self, name)  # torch would have a tensor there for good
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name not in self.parameters_made:
            self.__dict__["parameters_made"] = (*self.parameters_made, name)

    def _note_given(self, name: str, value: Any) -> None:
        """Keeps what an argument was, should a class of one's own make it a parameter now."""
        if is_ours(type(self)):
            return
        before = self.__dict__.get(name, self._buffers.get(name))
        given = {key: each for key, each in self.__dict__.get("_as_given", {}).items() if key != name}
        if isinstance(value, nn.Parameter) and before is not None:
            given[name] = before
        if given or "_as_given" in self.__dict__:
            self._as_given = given

    def arguments(self) -> dict[str, Any]:
        """The constructor arguments that build an equal component; what a class of one's own makes a parameter of is as
        it was given, for the parameter is among the weights."""
        given = self.__dict__.get("_as_given", {})
        return {name: given.get(name, _given(getattr(self, name))) for name in argument_names(type(self))}

    def rebuilt(self: C) -> C:
        """A new component, and new ones within it, from the same arguments."""
        return type(self)(**{name: _rebuilt(value) for name, value in self.arguments().items()})

    def spec(self) -> Spec:
        """What a server needs to build an equal component.

        Raises:
            TypeError: a class that is not registered by `@component`, and so has no name on the wire; or one whose
                `__init__` takes what is no field, and so cannot be told.
        """
        if _REGISTRY.get(type(self).__name__) is not type(self):
            raise TypeError(f"{type(self).__name__} is not a registered component: decorate it with @component")
        _check_constructor(type(self))
        arguments, fields = self.arguments(), argument_fields(type(self))
        _check_not_learned(type(self), arguments)
        return Spec(type(self).__name__, {each.name: _sent(arguments[each.name]) for each in fields if is_sent(each)})

    def extra_repr(self) -> str:
        submodules = dict(self.named_children())
        shown = {name: v for name, v in self.arguments().items() if name not in submodules and v is not None}
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
    for each in vars(cls).values():
        if isinstance(each, dataclasses.Field) and each.init and each.default_factory is not dataclasses.MISSING:
            # made when the argument is None, given or left out: see `Component.__setattr__`
            each.metadata = MappingProxyType({**each.metadata, "default_factory": each.default_factory})
            each.default, each.default_factory = None, dataclasses.MISSING
    made = dataclasses.dataclass(eq=False, repr=False)(cls)
    for each in dataclasses.fields(made):  # type: ignore[arg-type]  # the decorator made it one
        if each.init and each.name in made.__dict__ and not inspect.isfunction(made.__dict__[each.name]):
            delattr(made, each.name)  # a default left on the class would hide a module assigned to the field
    return made


@functools.cache
def _field(cls: type[Component], name: str) -> "dataclasses.Field[Any] | None":
    """The field of a class, or of any that it is written on: what is no dataclass names its first base's only."""
    every = (vars(each).get("__dataclass_fields__", {}) for each in cls.__mro__)
    return next((fields[name] for fields in every if name in fields), None)


def default_method(cls: type[Component], name: str) -> Callable[..., Any] | None:
    """The method that gives an argument its default, unless that is what its field says anyhow."""
    method: Callable[..., Any] | None = getattr(cls, f"get_default_{name}", None)
    return None if getattr(method, "of_field", False) else method


def default_getter(name: str) -> Any:
    """A method that gives an argument the default that its field has, for `super()` of one that gives another."""

    def get_default(self: Component) -> Any:
        return made_by_default(type(self), name)

    get_default.__doc__ = f"The {name} where none is given."
    get_default.of_field = True  # type: ignore[attr-defined]  # see `default_method`
    return get_default


def made_by_default(cls: type[Component], name: str) -> Any:
    """What the `default_factory` of an argument makes; None if it has none."""
    each = _field(cls, name)  # type: ignore[arg-type]  # mypy asks a class for its instances' hash
    factory = None if each is None else each.metadata.get("default_factory")
    return None if factory is None else factory()


def _check_constructor(cls: type[Component]) -> None:
    """Refuses a class that would be built without some of its arguments."""
    taken = list(inspect.signature(cls.__init__).parameters.values())[1:]
    named = [each.name for each in taken if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    unknown = [name for name in named if name not in argument_names(cls)]
    if unknown:
        raise TypeError(
            f"{cls.__name__}.__init__ takes {', '.join(unknown)}, of which a server cannot be told: declare what it "
            f"takes as fields of the class (`{unknown[0]}: float = 1.0`), and do the rest in __post_init__"
        )


def _check_not_learned(cls: type[Component], arguments: dict[str, Any]) -> None:
    """Refuses what a server would take for a number."""
    for name, value in arguments.items():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(each, Tensor) and each.requires_grad for each in items):
            raise TypeError(
                f"{name} of {cls.__name__} is learned, and a server would have it as a number and no gradient of it: "
                f"give the number (as in {name}.detach()), or learn it with a loss in this process"
            )


def _held(value: Any) -> Any:
    """An argument as the component holds it: what contains modules is a module."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    if not any(isinstance(item, nn.Module) for item in items):
        return value
    try:
        return nn.ModuleDict(value) if isinstance(value, dict) else nn.ModuleList(value)
    except (KeyError, TypeError) as error:  # a name that no attribute can have, or modules mixed with something else
        raise ValueError(f"components are given in a list, or by names: {error.args[0]!s}") from None


def _given(value: Any) -> Any:
    """An argument as the constructor takes it: the reverse of `_held`."""
    if isinstance(value, nn.ModuleDict):
        return dict(value.items())
    return list(value) if isinstance(value, nn.ModuleList) else value


def _rebuilt(value: Any) -> Any:
    if isinstance(value, Component):
        return value.rebuilt()
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return type(value)(_rebuilt(item) for item in value)
    if isinstance(value, dict):
        return {key: _rebuilt(item) for key, item in value.items()}
    return value


def _sent(value: Any) -> Any:
    if isinstance(value, Component):
        return value.spec()
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        return value.item()  # a number, whoever made it
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, list | tuple):
        return [_sent(item) for item in value]
    if isinstance(value, dict):
        return {key: _sent(item) for key, item in value.items()}
    return value


def same(a: Any, b: Any) -> bool:
    """Whether two arguments of specs are equal: tensors entry by entry, lists and tuples item by item."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        a, b = a.detach().cpu(), b.detach().cpu()
        return bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, Spec) or isinstance(b, Spec):
        return bool(a == b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


def argument_fields(cls: type[Component]) -> list["dataclasses.Field[Any]"]:
    """The fields that the constructor takes, positional ones first."""
    taken = [each for each in dataclasses.fields(cls) if each.init]  # type: ignore[arg-type]  # every component is one
    return sorted(taken, key=lambda each: bool(each.kw_only))


def is_sent(each: "dataclasses.Field[Any]") -> bool:
    """Whether the argument crosses the wire: all but those declared with `metadata={"wire": False}`."""
    return bool(each.metadata.get("wire", True))


def default_of(each: "dataclasses.Field[Any]") -> Any:
    """What the argument is if it is left out; `dataclasses.MISSING` if it must be given."""
    factory = each.metadata.get("default_factory")
    return each.default if factory is None else factory()


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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses `word`: the closest known word, or all of them."""
    words = sorted(known)
    plain = {each.lower(): each for each in words}
    close = difflib.get_close_matches(word.lower(), plain, n=1)
    return f"; did you mean {plain[close[0]]!r}?" if close else f"; known are {', '.join(words)}"
