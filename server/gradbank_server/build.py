"""From a spec to a component. Nothing is imported or run by name but the registered components."""

import functools
import operator
import types
import typing
from typing import Annotated, Any

from pydantic import GetPydanticSchema, TypeAdapter, ValidationError
from pydantic_core import core_schema

import gradbank.losses
import gradbank.miners  # noqa: F401  (with the losses, these register every component)
from gradbank.component import Component, Spec, argument_names, component_named, did_you_mean
from gradbank.errors import InvalidComponent
from gradbank.losses.base import Loss


def build_loss(spec: Spec) -> Loss:
    """The loss that `spec` names.

    Raises:
        InvalidComponent: as `build`, or a component that is not a loss.
    """
    made = build(spec)
    if not isinstance(made, Loss):
        raise InvalidComponent(f"a session holds a loss, and {spec.name} is not one")
    return made


def build(spec: Spec, where: str = "") -> Component:
    """The component that `spec` names, every argument checked against the annotation of its constructor.

    Raises:
        InvalidComponent: no such component, no such argument, or an argument that does not fit; the message names
            the argument and what would fit.
    """
    where = where or spec.name
    try:
        made = component_named(spec.name)
    except ValueError as error:
        raise InvalidComponent(str(error)) from None
    known, hints = argument_names(made), typing.get_type_hints(made)
    arguments = {}
    for name, value in spec.arguments.items():
        if name not in known:
            raise InvalidComponent(f"{where} has no argument {name!r}{did_you_mean(name, known)}")
        arguments[name] = _checked(_built(value, f"{where}.{name}"), hints[name], f"{where}.{name}")
    try:
        return made(**arguments)
    except (TypeError, ValueError) as error:
        raise InvalidComponent(f"{where} cannot be built: {error}") from None


def _built(value: Any, where: str) -> Any:
    if isinstance(value, Spec):
        return build(value, where)
    if isinstance(value, list):
        return [_built(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: _built(item, f"{where}[{key!r}]") for key, item in value.items()}
    return value


def _checked(value: Any, hint: Any, where: str) -> Any:
    try:
        return TypeAdapter(_instances(hint)).validate_python(value, strict=True)
    except ValidationError as error:
        said = type(value).__name__ if isinstance(value, Component) else repr(value)
        raise InvalidComponent(f"{where}: {error.errors()[0]['msg']}, got {said}") from None


def _instances(hint: Any) -> Any:
    """`hint` with each component class meaning its instances.

    pydantic would take a dataclass apart instead, and (even with its own `InstanceOf`) put defaults on the class, where
    they hide the modules of every instance.
    """
    if isinstance(hint, type) and issubclass(hint, Component):
        return Annotated[hint, GetPydanticSchema(lambda source, handler: core_schema.is_instance_schema(source))]
    arguments = tuple(_instances(each) for each in typing.get_args(hint))
    match typing.get_origin(hint):
        case types.UnionType | typing.Union:
            return functools.reduce(operator.or_, arguments)
        case container if container in (list, dict, tuple):
            return types.GenericAlias(container, arguments)
    return hint
