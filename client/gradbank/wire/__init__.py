"""Tensors, components and errors as messages, and back: used by both sides of the wire."""

from gradbank.wire.components import argument_messages, argument_values, component_message, leave_out_entries, spec_of
from gradbank.wire.errors import ERROR_TRAILER, error_message, error_of, status_of
from gradbank.wire.frames import Frame, frame_of, gradient_bytes, request_frame, response_frame
from gradbank.wire.payload import (
    CHUNK_BYTES,
    LONGEST_S,
    MESSAGE_BYTES,
    PACKET_BYTES,
    Assembly,
    assembled,
    chunks,
)
from gradbank.wire.state import state_bytes, state_message, state_of
from gradbank.wire.tensors import (
    TensorReader,
    describe,
    inline,
    nbytes,
    read_inline,
    shape_of,
    torch_dtype,
    wire_dtype,
)
from gradbank.wire.timings import seconds_of, seconds_of_both

__all__ = [
    "CHUNK_BYTES",
    "ERROR_TRAILER",
    "LONGEST_S",
    "MESSAGE_BYTES",
    "PACKET_BYTES",
    "Assembly",
    "Frame",
    "TensorReader",
    "argument_messages",
    "argument_values",
    "assembled",
    "chunks",
    "component_message",
    "describe",
    "error_message",
    "error_of",
    "frame_of",
    "gradient_bytes",
    "inline",
    "leave_out_entries",
    "nbytes",
    "read_inline",
    "request_frame",
    "response_frame",
    "seconds_of",
    "seconds_of_both",
    "shape_of",
    "spec_of",
    "state_bytes",
    "state_message",
    "state_of",
    "status_of",
    "torch_dtype",
    "wire_dtype",
]
