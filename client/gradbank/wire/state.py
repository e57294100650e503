"""The weights and banks of a loss, by name, as they are sent."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from gradbank.v1 import session_pb2
from gradbank.wire.tensors import TensorReader, describe, nbytes


def state_message(state: Mapping[str, Tensor]) -> tuple[list[session_pb2.NamedTensor], list[memoryview]]:
    """The messages of named tensors, and the payload that their bytes ride in."""
    named, payload = [], []
    for name, value in state.items():
        message, data = describe(value)
        named.append(session_pb2.NamedTensor(name=name, tensor=message))
        payload.append(data)
    return named, payload


def state_of(named: Iterable[session_pb2.NamedTensor], payload: Tensor) -> dict[str, Tensor]:
    """The named tensors whose bytes are a payload: views of it, as a `TensorReader` takes them.

    Raises:
        InvalidRequest: a payload that is not as long as they are.
    """
    reader = TensorReader(payload)
    state = {each.name: reader.take(each.tensor) for each in named}
    reader.finish()
    return state


def state_bytes(named: Iterable[session_pb2.NamedTensor]) -> int:
    """How long that payload is."""
    return sum(nbytes(each.tensor) for each in named)
