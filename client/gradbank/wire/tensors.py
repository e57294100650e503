"""`torch.Tensor` to and from `gradbank.v1.Tensor`."""

import sys

import torch
from torch import Tensor

from gradbank.errors import InvalidRequest
from gradbank.v1 import tensor_pb2 as v1
from gradbank.wire.payload import assembled

_TORCH = {
    v1.DTYPE_FLOAT32: torch.float32,
    v1.DTYPE_FLOAT64: torch.float64,
    v1.DTYPE_FLOAT16: torch.float16,
    v1.DTYPE_BFLOAT16: torch.bfloat16,
    v1.DTYPE_INT64: torch.int64,
    v1.DTYPE_INT32: torch.int32,
    v1.DTYPE_BOOL: torch.bool,
}
_PROTO = {dtype: number for number, dtype in _TORCH.items()}
_MAX_DIMENSIONS, _MAX_ENTRIES = 8, 2**48
_ALIGNMENT = 64  # bytes; what torch's own memory has

if sys.byteorder != "little":
    raise ImportError("gradbank's wire format is little-endian, and so must be the machine")


def describe(tensor: Tensor) -> tuple[v1.Tensor, memoryview]:
    """The message of a tensor whose bytes ride in a payload, and those bytes (a view where that is possible).

    Raises:
        InvalidRequest: a dtype or layout that does not cross the wire.
    """
    if not isinstance(tensor, Tensor):
        raise InvalidRequest(f"what is sent must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise InvalidRequest(f"a tensor of layout {tensor.layout} cannot be sent; make it dense with to_dense()")
    if tensor.is_meta:
        raise InvalidRequest("a tensor of the device meta cannot be sent: it has no entries")
    if tensor.dtype not in _PROTO:
        raise InvalidRequest(
            f"a tensor of dtype {tensor.dtype} cannot be sent; convert it to one of "
            f"{', '.join(str(d).removeprefix('torch.') for d in _PROTO)}"
        )
    flat = tensor.detach().cpu().resolve_neg().contiguous().view(-1)
    if flat.numel() == 1:
        flat = flat.as_strided((1,), (1,))  # torch calls one number contiguous, whatever its stride
    try:
        data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    except RuntimeError as error:  # of a subclass that has its entries elsewhere
        raise InvalidRequest(f"a {type(tensor).__name__} cannot be sent; give it as a plain tensor ({error})") from None
    return v1.Tensor(dtype=_PROTO[tensor.dtype], shape=tensor.shape), data


def inline(tensor: Tensor) -> v1.Tensor:
    """The message of a tensor that carries its own bytes."""
    message, data = describe(tensor)
    message.data = bytes(data)
    return message


def nbytes(message: v1.Tensor) -> int:
    """How many bytes the described tensor takes.

    Raises:
        InvalidRequest: a dtype or shape that no tensor has.
    """
    dtype, shape = torch_dtype(message.dtype), message.shape
    entries = number = 1  # strides are products too, whether or not one size is 0
    for size in shape:
        entries, number = entries * (size or 1), number * size
    if len(shape) > _MAX_DIMENSIONS or entries > _MAX_ENTRIES or (shape and min(shape) < 0):
        few = f"{list(shape)[:_MAX_DIMENSIONS]}{'...' if len(shape) > _MAX_DIMENSIONS else ''}"
        raise InvalidRequest(
            f"a tensor cannot have shape {few}: it has at most {_MAX_DIMENSIONS} dimensions, of 0 or more each, and "
            "2^48 entries"
        )
    return number * dtype.itemsize


def torch_dtype(number: int) -> torch.dtype:
    if number not in _TORCH:
        raise InvalidRequest(f"a tensor's dtype must be one of {sorted(_TORCH)} (see tensor.proto), got {number}")
    return _TORCH[v1.Dtype.ValueType(number)]


def wire_dtype(dtype: torch.dtype) -> v1.Dtype.ValueType:
    return _PROTO[dtype]


def read_inline(message: v1.Tensor) -> Tensor:
    """The tensor of a message that carries its own bytes."""
    if nbytes(message) != len(message.data):
        raise InvalidRequest(
            f"a tensor of shape {list(message.shape)} takes {nbytes(message)} bytes, got {len(message.data)}"
        )
    return _tensor(message, assembled([memoryview(message.data)]))


def shape_of(message: v1.Tensor) -> Tensor:
    """A tensor of the device "meta", which has no entries, for one whose entries were left out."""
    nbytes(message)  # which refuses what no tensor is
    return torch.empty(tuple(message.shape), dtype=torch_dtype(message.dtype), device="meta")


class TensorReader:
    """Takes tensors off the front of a payload, `(size,)` uint8, one after the other: views of it, where they lie as a
    tensor of its own would, so that no result depends on where a tensor came from.

    Raises:
        InvalidRequest: a payload that is shorter, or (from `finish`) longer, than its tensors.
    """

    def __init__(self, payload: Tensor) -> None:
        self._payload = payload
        self._start = 0

    def take(self, message: v1.Tensor) -> Tensor:
        start, stop = self._start, self._start + nbytes(message)
        if stop > len(self._payload):
            raise InvalidRequest(f"a payload of {len(self._payload)} bytes ends inside a tensor that goes to {stop}")
        part, self._start = self._payload[start:stop], stop
        return _tensor(message, part.clone() if start % _ALIGNMENT else part)

    def finish(self) -> None:
        if self._start != len(self._payload):
            raise InvalidRequest(f"a payload of {len(self._payload)} bytes has tensors of {self._start} only")


def _tensor(message: v1.Tensor, data: Tensor) -> Tensor:
    """The tensor whose bytes these are."""
    dtype = torch_dtype(message.dtype)
    if dtype == torch.bool and len(data) and int(data.max()) > 1:
        raise InvalidRequest("the entries of a bool tensor are bytes of 0 or 1")
    return data.view(dtype).view(tuple(message.shape))
