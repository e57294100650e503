"""From a spec to a component. Nothing is imported or run by name but the registered components."""

import collections.abc
import functools
import importlib
import operator
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, GetPydanticSchema, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from pydantic_core import core_schema
from torch import Tensor, nn

import gradbank.losses
import gradbank.miners  # noqa: F401  (with the losses, these register every component)
from gradbank.arguments import argument_fields
from gradbank.component import Component, component_named, components
from gradbank.errors import InvalidComponent, InvalidRequest, LimitExceeded
from gradbank.losses.loss import Loss
from gradbank.spec import Spec
from gradbank.suggestion import did_you_mean
from gradbank_server.sessions import is_out_of_memory

_CONTAINERS = (list, dict, collections.abc.Sequence, collections.abc.Mapping)


def import_components(packages: Iterable[str]) -> None:
    """Imports packages whose components are to be hosted. Only what starts a server names them, never a client.

    Raises:
        InvalidRequest: a package that is not there, fails, or has no component.
    """
    for name in packages:
        asked = f"--components (GRADBANK_COMPONENTS) names {name!r}"
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = "which is not installed" if error.name == name else f"which needs {error.name!r}"
            raise InvalidRequest(
                f"{asked}, {missing} where the server runs: install it there, or put its folder on PYTHONPATH"
            ) from None
        except (Exception, SystemExit) as error:
            raise InvalidRequest(f"{asked}, and importing it failed: {type(error).__name__}: {error}") from error
        held = {id(value) for value in vars(module).values()}
        if not any(f"{each.__module__}.".startswith(f"{name}.") or id(each) in held for each in components().values()):
            raise InvalidRequest(
                f"{asked}, which registers no component: decorate its classes with @gradbank.component, and import "
                f"their modules in {name}"
            )


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
        raise InvalidComponent(
            f"{error}. A server hosts components of your own if it is started with --components (GRADBANK_COMPONENTS) "
            "naming their package"
        ) from None
    known, hints = {each.name: each for each in argument_fields(made)}, _hints(made)
    arguments = {}
    for name, value in spec.arguments.items():
        if name not in known:
            raise InvalidComponent(f"{where} has no argument {name!r}{did_you_mean(name, known)}")
        if value is None and known[name].default is None:
            continue  # the default, whatever that stands for
        arguments[name] = _checked(_built(value, f"{where}.{name}"), hints[name], f"{where}.{name}")
    try:
        return made(**arguments)
    except (TypeError, ValueError) as error:
        raise InvalidComponent(f"{where} cannot be built: {error}") from None
    except (Exception, SystemExit) as error:  # arguments that fit their types may still be too much for a constructor
        if isinstance(error, Exception) and is_out_of_memory(error):
            raise LimitExceeded(f"{where} cannot be built: the server has no memory for it") from None
        raise InvalidComponent(f"{where} cannot be built: {type(error).__name__}: {error}") from error


def _built(value: Any, where: str) -> Any:
    if isinstance(value, Spec):
        return build(value, where)
    if isinstance(value, list | tuple):
        return [_built(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {key: _built(item, f"{where}[{key!r}]") for key, item in value.items()}
    return value


def _hints(made: type[Component]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(made)
    except NameError as error:
        raise InvalidComponent(
            f"{made.__name__} cannot be built: an argument's type is unknown there: {error}"
        ) from None


def _checked(value: Any, hint: Any, where: str) -> Any:
    try:
        return TypeAdapter(_instances(hint)).validate_python(value, strict=True)
    except ValidationError as error:
        raise InvalidComponent(f"{where}: {error.errors()[0]['msg']}, got {_said(value)}") from None
    except PydanticSchemaGenerationError:
        raise InvalidComponent(f"{where} is declared as {hint}, which cannot be checked, nor sent") from None


def _said(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)


def _instances(hint: Any) -> Any:
    """`hint` with each class of modules or tensors meaning its instances, and each tuple taking what the wire makes
    of it, a list.

    pydantic would take a dataclass apart instead, and (even with its own `InstanceOf`) put defaults on the class, where
    they hide the modules of every instance.
    """
    if isinstance(hint, type) and issubclass(hint, nn.Module | Tensor):
        return Annotated[hint, GetPydanticSchema(lambda source, handler: core_schema.is_instance_schema(source))]
    origin, arguments = typing.get_origin(hint), tuple(_instances(each) for each in typing.get_args(hint))
    if origin in (types.UnionType, typing.Union):
        return functools.reduce(operator.or_, arguments)
    if tuple in (origin, hint):
        of = types.GenericAlias(tuple, arguments) if arguments else tuple
        return Annotated[of, BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]
    return types.GenericAlias(origin, arguments) if origin in _CONTAINERS else hint
