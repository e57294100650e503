"""Specs of components to and from messages."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from gradbank.errors import InvalidComponent
from gradbank.spec import Spec
from gradbank.v1 import component_pb2 as v1
from gradbank.v1 import tensor_pb2
from gradbank.wire.tensors import inline, read_inline

_MAX_DEPTH = 16  # of components, lists and dictionaries; protobuf reads some 30


def component_message(spec: Spec) -> v1.Component:
    """The message of a spec.

    Raises:
        InvalidComponent: an argument that cannot be sent, such as a function.
    """
    return v1.Component(name=spec.name, arguments=argument_messages(spec.arguments, spec.name))


def argument_messages(arguments: Mapping[str, Any], where: str) -> dict[str, v1.Argument]:
    return {name: _argument(value, f"{where}.{name}") for name, value in arguments.items()}


def leave_out_entries(message: v1.Component) -> None:
    """Takes the entries of its tensors out of a message, and leaves what they are."""
    waiting = list(message.arguments.values())
    while waiting:
        argument = waiting.pop()
        match argument.WhichOneof("value"):
            case "tensor":
                argument.tensor.ClearField("data")
            case "component":
                waiting.extend(argument.component.arguments.values())
            case "list":
                waiting.extend(argument.list.items)
            case "map":
                waiting.extend(argument.map.items.values())


def spec_of(
    message: v1.Component, depth: int = 0, tensors: Callable[[tensor_pb2.Tensor], Tensor] = read_inline
) -> Spec:
    """The spec in a message.

    Args:
        tensors: what reads its tensors.

    Raises:
        InvalidComponent: an argument without a value, or components nested too deeply.
    """
    if depth > _MAX_DEPTH:
        raise InvalidComponent(f"what a loss is made of may be nested {_MAX_DEPTH} deep, and {message.name} is deeper")
    return Spec(message.name, argument_values(message.arguments, message.name, depth, tensors))


def argument_values(
    arguments: Mapping[str, v1.Argument],
    where: str,
    depth: int = 0,
    tensors: Callable[[tensor_pb2.Tensor], Tensor] = read_inline,
) -> dict[str, Any]:
    return {name: _value(arguments[name], f"{where}.{name}", depth, tensors) for name in sorted(arguments)}


def _argument(value: Any, where: str) -> v1.Argument:
    if value is None:
        return v1.Argument(none=True)
    if isinstance(value, bool):  # before int, which it is too
        return v1.Argument(flag=value)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InvalidComponent(f"{where} is {value}, which does not fit 64 bits")
        return v1.Argument(integer=value)
    if isinstance(value, float):
        return v1.Argument(number=value)
    if isinstance(value, str):
        return v1.Argument(text=value)
    if isinstance(value, Tensor):
        return v1.Argument(tensor=inline(value))
    if isinstance(value, Spec):
        return v1.Argument(component=component_message(value))
    if isinstance(value, list | tuple):
        items = [_argument(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return v1.Argument(list=v1.ArgumentList(items=items))
    if isinstance(value, Mapping):
        odd = [key for key in value if not isinstance(key, str)]
        if odd:
            raise InvalidComponent(f"{where} has the key {odd[0]!r}, and only strings can be sent as keys")
        return v1.Argument(map=v1.ArgumentMap(items=argument_messages(value, where), order=list(value)))
    raise InvalidComponent(f"{where} is a {type(value).__name__}, which cannot be sent to a server")


def _value(message: v1.Argument, where: str, depth: int, tensors: Callable[[tensor_pb2.Tensor], Tensor]) -> Any:
    if depth > _MAX_DEPTH:
        raise InvalidComponent(f"{where} is nested more than {_MAX_DEPTH} deep")
    match message.WhichOneof("value"):
        case "none":
            return None
        case "tensor":
            return tensors(message.tensor)
        case "component":
            return spec_of(message.component, depth + 1, tensors)
        case "list":
            return [_value(item, f"{where}[{i}]", depth + 1, tensors) for i, item in enumerate(message.list.items)]
        case "map":
            values, order = argument_values(message.map.items, where, depth + 1, tensors), list(message.map.order)
            return {key: values[key] for key in order} if sorted(order) == list(values) else values
        case None:
            raise InvalidComponent(f"{where} has no value")
        case kind:
            return getattr(message, kind)
