"""Messages of a stream of steps, written and read without a copy of their payload.

A `StepsRequest` and a `StepsResponse` are a small message and the raw bytes of tensors. protobuf would copy these into
its message and out of it again; here they are laid after the small message as protobuf's encoding has it, and read
where they arrived. Other clients use what their language generates from the .proto file, and see no difference.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from gradbank.errors import InvalidRequest
from gradbank.v1 import step_pb2
from gradbank.wire.tensors import nbytes, torch_dtype

_STEP, _PAYLOAD = b"\x0a", b"\x12"  # fields 1 and 2, each preceded by its length
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

M = TypeVar("M", bound=Message)


class Frame(NamedTuple):
    """A message of a stream: what to do or what came of it, if it is the first of a step, and some of the payload."""

    step: Message | None
    payload: Sequence[memoryview]

    def encoded(self) -> bytes:
        """The message in protobuf's encoding."""
        parts: list[bytes | memoryview] = []
        if self.step is not None:
            header = self.step.SerializeToString()
            parts += [_STEP, _varint(len(header)), header]
        if self.payload:
            parts += [_PAYLOAD, _varint(sum(map(len, self.payload))), *self.payload]
        return b"".join(parts)

    @property
    def size(self) -> int:
        return sum(map(len, self.payload))


def frame_of(data: bytes, kind: type[M]) -> Frame:
    """The frame in a message whose first field is a `kind`; its payload is a view of `data`.

    Raises:
        InvalidRequest: not a protobuf message, or one with other types in these fields.
    """
    view, place, step, payload = memoryview(data), 0, None, memoryview(b"")
    try:
        while place < len(data):
            tag, place = _read_varint(data, place)
            field, wire = tag >> 3, tag & 7
            if not field:
                raise InvalidRequest("a message of the stream has a field 0, which protobuf does not")
            if wire == _BYTES:
                size, place = _read_varint(data, place)
            elif wire == _VARINT:
                _, place = _read_varint(data, place)
                size = 0
            elif wire in (_FIXED64, _FIXED32):
                size = 8 if wire == _FIXED64 else 4
            else:
                raise InvalidRequest(f"a message of the stream has a field of wire type {wire}")
            if place + size > len(data):
                raise InvalidRequest("a message of the stream ends inside a field")
            part, place = view[place : place + size], place + size
            if field in (1, 2) and wire != _BYTES:
                raise InvalidRequest(f"field {field} of a message of the stream has wire type {wire}")
            if field == 1:
                step = kind() if step is None else step
                step.MergeFromString(bytes(part))  # as protobuf has it, should the field come twice
            elif field == 2:
                payload = part
    except DecodeError as error:
        raise InvalidRequest(f"a message of the stream has a step that cannot be read: {error}") from None
    return Frame(step, (payload,) if len(payload) else ())


def request_frame(data: bytes) -> "Frame | InvalidRequest":
    """The frame in a StepsRequest. What is wrong with one is returned, for an error raised here would tell nothing."""
    try:
        return frame_of(data, step_pb2.StepInput)
    except InvalidRequest as error:
        return error


def response_frame(data: bytes) -> Frame:
    """The frame in a StepsResponse."""
    return frame_of(data, step_pb2.StepOutput)


def gradient_bytes(step: step_pb2.StepInput) -> int:
    """How many bytes the gradients take that a step asks for.

    Raises:
        InvalidRequest: a dtype or shape that no tensor has.
    """
    asked = [step.embeddings] if step.embeddings_need_gradient and step.HasField("embeddings") else []
    asked += [step.ref_emb] if step.ref_emb_needs_gradient and step.HasField("ref_emb") else []
    size = 0
    for each in asked:
        own = torch_dtype(each.dtype).itemsize
        # those of half precision come as float32, unless they are to be rounded
        size += nbytes(each) // own * (2 if step.gradient_dtype else max(own, 4))
    return size


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    made.append(number)
    return bytes(made)


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    """A number and the place after it."""
    number = shift = 0
    while True:
        if place >= len(data) or shift > 63:
            raise InvalidRequest("a message of the stream has a number that does not end")
        byte = data[place]
        number |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return number, place
