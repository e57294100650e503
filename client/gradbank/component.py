"""Modules that can cross the wire by name: a component's fields are its constructor's arguments."""

import dataclasses
import inspect
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar, dataclass_transform

import numpy as np
import torch
from torch import Tensor, nn

from gradbank.arguments import (
    argument_fields,
    argument_names,
    as_given,
    check_constructor,
    check_not_learned,
    field_of,
    held,
    is_sent,
    made_by_default,
)
from gradbank.overrides import is_ours
from gradbank.parts import check_part
from gradbank.spec import Spec
from gradbank.suggestion import did_you_mean

C = TypeVar("C", bound="Component")


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
        each = field_of(type(self), name)  # type: ignore[arg-type]  # mypy asks a class for its instances' hash
        if each is None or not each.init:
            super().__setattr__(name, value)
            return
        if value is None:
            factory = getattr(self, f"get_default_{name}", None)
            value = made_by_default(type(self), name) if factory is None else factory()
        check_part(type(self), name, value)
        value = held(value)
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
        return {name: given.get(name, as_given(getattr(self, name))) for name in argument_names(type(self))}

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
        check_constructor(type(self))
        arguments, fields = self.arguments(), argument_fields(type(self))
        check_not_learned(type(self), arguments)
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
