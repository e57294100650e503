"""Frames: what protobuf would read and write, without its copies; and what is no frame."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbank.errors import InvalidRequest
from gradbank.v1 import step_pb2, tensor_pb2
from gradbank.wire import Frame, frame_of, request_frame, response_frame

STEP = step_pb2.StepInput(
    session="run", seq=300, payload_bytes=12, embeddings=tensor_pb2.Tensor(dtype=1, shape=[3, 1]), labels=None
)


def read(data: bytes) -> tuple[step_pb2.StepInput | None, bytes]:
    frame = frame_of(data, step_pb2.StepInput)
    return frame.step, b"".join(frame.payload)


@given(st.booleans(), st.lists(st.binary(max_size=300), max_size=4))
@settings(max_examples=100, deadline=None, database=None, derandomize=True)
def test_a_frame_is_the_message_that_protobuf_writes(has_step: bool, parts: list[bytes]) -> None:
    step, payload = STEP if has_step else None, b"".join(parts)
    plain = step_pb2.StepsRequest(step=step, payload=payload)
    made = Frame(step, [memoryview(part) for part in parts]).encoded()
    assert step_pb2.StepsRequest.FromString(made) == plain
    assert read(made) == read(plain.SerializeToString()) == (step, payload)


def test_the_payload_of_a_frame_is_not_copied() -> None:
    data = Frame(STEP, [memoryview(bytes(1000))]).encoded()
    (payload,) = frame_of(data, step_pb2.StepInput).payload
    assert payload.obj is data


def test_fields_may_come_in_any_order_twice_or_unknown() -> None:
    """As protobuf has it: a message that comes twice is merged, of bytes the last holds, what is unknown is skipped."""
    first, second = step_pb2.StepInput(session="a", seq=1), step_pb2.StepInput(seq=2)
    unknown = b"\x18\x96\x01" + b"\x21" + bytes(8) + b"\x2d" + bytes(4) + b"\x32\x02ab"  # a varint, 8, 4 and 2 bytes
    data = b"\x12\x01x" + Frame(first, ()).encoded() + unknown + Frame(second, [memoryview(b"yz")]).encoded()
    plain = step_pb2.StepsRequest.FromString(data)
    assert read(data) == (plain.step, plain.payload) == (step_pb2.StepInput(session="a", seq=2), b"yz")
    assert read(b"") == (None, b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a", "a number that does not end"),
        (b"\x0a\x05ab", "ends inside a field"),
        (b"\x12\xff\xff\xff\xff\x0f", "ends inside a field"),
        (b"\x12" + b"\xff" * 10, "a number that does not end"),
        (b"\x80" * 11, "a number that does not end"),
        (b"\x08\x01", "field 1 of a message of the stream has wire type 0"),
        (b"\x15abcd", "field 2 of a message of the stream has wire type 5"),
        (b"\x0b\x0c", "wire type 3"),
        (b"\x00\x00", "field 0"),
        (b"\x0a\x02\x08\xff", "a step that cannot be read"),
    ],
)
def test_what_is_no_frame_is_refused_by_name(data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        frame_of(data, step_pb2.StepInput)
    refused = request_frame(data)
    assert isinstance(refused, InvalidRequest)  # an error raised while gRPC reads would tell the trainer nothing


def _flip(data: bytearray, where: random.Random) -> None:
    data[where.randrange(len(data))] ^= 1 << where.randrange(8)


def _cut(data: bytearray, where: random.Random) -> None:
    del data[where.randrange(len(data)) :]


def _repeat(data: bytearray, where: random.Random) -> None:
    start = where.randrange(len(data))
    data[where.randrange(len(data)) : 0] = data[start : start + where.randrange(20)]


def _write(data: bytearray, where: random.Random) -> None:
    start = where.randrange(len(data))
    data[start : start + 9] = where.choice([b"\xff" * 9, bytes(9), b"\x0a\x12\x1a\x80\x80\x80\x80\x80\x01"])


MUTATIONS: list[Callable[[bytearray, random.Random], None]] = [_flip, _cut, _repeat, _write]


def test_no_mutation_of_a_frame_is_more_than_a_bad_request() -> None:
    """200,000 of them: read as protobuf reads them, or refused."""
    honest = Frame(STEP, [memoryview(b"0123456789ab")]).encoded()
    where = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(200_000):
        data = bytearray(honest)
        for _ in range(where.randint(1, 3)):
            if data:
                where.choice(MUTATIONS)(data, where)
        try:
            step, payload = read(bytes(data))
        except InvalidRequest:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert len(payload) <= len(data)
        if outcomes["read"] % 50 == 0:  # protobuf's own reading takes longer
            try:
                plain = step_pb2.StepsRequest.FromString(bytes(data))
            except Exception:  # stricter than need be about what it skips
                continue
            assert plain.payload == payload
            assert plain.step == (step or step_pb2.StepInput())
    assert min(outcomes.values()) > 10_000


def test_an_answer_is_read_as_a_request_is() -> None:
    output = step_pb2.StepOutput(seq=7, payload_bytes=3)
    plain = step_pb2.StepsResponse(step=output, payload=b"abc")
    frame = response_frame(plain.SerializeToString())
    assert (frame.step, b"".join(frame.payload), frame.size) == (output, b"abc", 3)
