"""Tensors cross the wire bit by bit, and what is no tensor is refused by name."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradbank.errors import GradbankError, InvalidRequest
from gradbank.v1 import step_pb2, tensor_pb2
from gradbank.wire import Assembly, TensorReader, assembled, chunks, describe, inline, nbytes, read_inline
from gradbank_server.service.steps import batch_of

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool]
SHAPES = [(), (0,), (1,), (3, 0, 2), (5,), (2, 3), (1, 1, 1, 1, 1, 1, 1, 1), (4, 2, 3)]


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def random_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Any bits that a tensor of this dtype may have: NaN payloads, infinities, subnormals, -0."""
    made = random.Random(seed)
    tensor = torch.empty(shape, dtype=dtype)
    top = 1 if dtype == torch.bool else 255
    if tensor.numel():
        raw = torch.tensor([made.randint(0, top) for _ in range(tensor.nbytes)], dtype=torch.uint8)
        tensor.view(-1).view(torch.uint8).copy_(raw)
    return tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_comes_back_bit_by_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for seed in range(5):
        tensor = random_bits(dtype, shape, seed)
        message, data = describe(tensor)
        for back in (TensorReader(assembled([data])).take(message), read_inline(inline(tensor))):
            assert (back.dtype, back.shape, bits(back)) == (tensor.dtype, tensor.shape, bits(tensor))
        assert nbytes(message) == len(data) == tensor.nbytes


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**32)), max_size=6
    ),
    st.integers(1, 64),
)
@settings(max_examples=150, deadline=None, database=None, derandomize=True)
def test_many_tensors_share_a_payload_cut_up_in_any_size(described: list, size: int) -> None:
    tensors = [random_bits(dtype, tuple(shape), seed) for dtype, shape, seed in described]
    messages, buffers = zip(*map(describe, tensors), strict=True) if tensors else ((), ())
    parts = [b"".join(part) for part in chunks(buffers, size)]
    assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
    payload = Assembly(sum(map(nbytes, messages)))
    for part in parts:
        payload.add(part)
    assert payload.complete
    reader = TensorReader(payload.payload())
    back = [reader.take(message) for message in messages]
    reader.finish()
    assert [bits(each) for each in back] == [bits(each) for each in tensors]


def test_views_are_sent_as_what_they_show() -> None:
    base = torch.arange(24.0).view(4, 6).requires_grad_()
    for view in (base.T, base[:, ::2], base[1], base[1, 1], base.expand(2, 4, 6), base[2:2]):
        back = read_inline(inline(view))
        assert torch.equal(back, view)
        assert not back.requires_grad


def test_what_is_read_is_a_copy() -> None:
    data = bytearray(inline(torch.ones(4)).data)
    message = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[4])
    tensor = TensorReader(assembled([memoryview(data)])).take(message)
    data[:] = bytes(16)
    tensor.add_(1)
    assert tensor.tolist() == [2.0] * 4


def test_every_tensor_of_a_payload_lies_as_torch_lays_its_own() -> None:
    tensors = [torch.randn(3), torch.tensor([True]), torch.randn(5, dtype=torch.float64), torch.arange(3)]
    messages, buffers = zip(*map(describe, tensors), strict=True)
    reader = TensorReader(assembled(buffers))
    back = [reader.take(message) for message in messages]
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))
    assert [each.data_ptr() % 64 for each in back] == [0] * 4


def test_bytes_are_little_endian_and_in_c_order() -> None:
    assert inline(torch.tensor([[1, 2], [3, 256]], dtype=torch.int32)).data.hex() == "01000000020000000300000000010000"
    assert inline(torch.tensor(1.0, dtype=torch.bfloat16)).data.hex() == "803f"
    assert inline(torch.tensor([True, False])).data.hex() == "0100"


def test_a_dtype_that_does_not_travel_is_refused_with_those_that_do() -> None:
    with pytest.raises(InvalidRequest, match=r"dtype torch.complex64 cannot be sent; convert it to one of float32, "):
        describe(torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "message"),
    [
        (0, [1], b"", "a tensor's dtype must be one of"),
        (99, [1], b"", "a tensor's dtype must be one of .* got 99"),
        (1, [-1], b"", r"a tensor cannot have shape \[-1\]"),
        (1, [-2, -2], b"\0" * 16, r"a tensor cannot have shape \[-2, -2\]"),
        (1, [1] * 9, b"\0" * 4, "a tensor cannot have shape"),
        (1, [2], b"\0" * 7, "takes 8 bytes, got 7"),
        (1, [2], b"\0" * 9, "takes 8 bytes, got 9"),
        (1, [], b"", "takes 4 bytes, got 0"),
        (1, [2**40, 2**40], b"", "cannot have shape"),
        (1, [2**62, 4], b"", "bytes, got 0|shape"),  # 2**66 bytes are 0 where integers wrap around
        (1, [0, 2**62, 2**62], b"", "shape"),
        (7, [2], b"\x01\x02", "bool"),
    ],
)
def test_what_is_no_tensor_is_refused(dtype: int, shape: list[int], data: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_inline(tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data))


def test_a_payload_must_fit_its_tensors() -> None:
    message, data = describe(torch.zeros(3))
    with pytest.raises(InvalidRequest, match="a payload of 11 bytes ends inside a tensor that goes to 12"):
        TensorReader(assembled([data[:-1]])).take(message)
    reader = TensorReader(assembled([data, memoryview(b"x")]))
    reader.take(message)
    with pytest.raises(InvalidRequest, match="a payload of 13 bytes has tensors of 12 only"):
        reader.finish()
    payload = Assembly(3)
    payload.add(b"ab")
    with pytest.raises(InvalidRequest, match="a payload of 3 bytes was announced, and at least 4 came"):
        payload.add(b"cd")


def honest_step() -> tuple[step_pb2.StepInput, bytes]:
    tensors = {
        "embeddings": torch.randn(4, 3), "labels": torch.arange(4), "ref_emb": torch.randn(5, 3),
        "ref_labels": torch.arange(5), "enqueue_mask": torch.tensor([True, False, True, False]),
    }  # fmt: skip
    described = {name: describe(tensor) for name, tensor in tensors.items()}
    index = describe(torch.arange(2))
    step = step_pb2.StepInput(
        session="run", seq=1, **{name: message for name, (message, _) in described.items()}, indices=[index[0]] * 3,
        weight_events=[step_pb2.WeightEvent(backward=step_pb2.Backward(seq=1, scale=0.5))],
    )  # fmt: skip
    data = [bytes(described[name][1]) for name in ("embeddings", "labels", "ref_emb", "ref_labels")]
    return step, b"".join([*data, *[bytes(index[1])] * 3, bytes(described["enqueue_mask"][1])])


def mutated(where: random.Random) -> tuple[step_pb2.StepInput, bytes]:
    """An honest step with one to three things wrong with it."""
    step, payload = honest_step()
    for _ in range(where.randint(1, 3)):
        tensors = [step.embeddings, step.labels, step.ref_emb, step.ref_labels, step.enqueue_mask, *step.indices]
        tensor = where.choice(tensors)
        match where.randrange(7):
            case 0:
                tensor.dtype = where.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, -1, 2**31 - 1])
            case 1:
                tensor.shape.append(where.choice([0, 1, -1, 2, 2**31, 2**62, 2**63 - 1, -(2**63)]))
            case 2:
                if tensor.shape:
                    tensor.shape[where.randrange(len(tensor.shape))] = where.choice([0, -1, 1, 2**32, 2**63 - 1])
            case 3:
                del tensor.shape[:]
            case 4:
                cut = where.randrange(len(payload) + 1)
                payload = where.choice([payload[:cut], payload[cut:], payload + payload[:cut], b""])
            case 5:
                step.weight_events.add()
            case 6:
                raw = bytearray(step.SerializeToString())
                raw[where.randrange(len(raw))] ^= 1 << where.randrange(8)
                try:
                    step = step_pb2.StepInput.FromString(bytes(raw))
                except Exception:  # protobuf itself refuses it: such bytes never arrive
                    continue
    return step, payload


def test_no_mutation_of_a_step_is_more_than_a_bad_request() -> None:
    outcomes = {"read": 0, "refused": 0}
    for seed in itertools.islice(itertools.count(), 4000):
        step, payload = mutated(random.Random(seed))
        try:
            batch = batch_of(step, assembled([memoryview(payload)]))
        except GradbankError as error:
            assert isinstance(error, InvalidRequest), f"seed {seed}"  # noqa: PT017
            outcomes["refused"] += 1
        else:
            given = [batch.embeddings, batch.labels, batch.ref_emb, batch.ref_labels, batch.enqueue_mask]
            size = sum(each.nbytes for each in [*given, *batch.indices] if each is not None)
            assert size == len(payload), f"seed {seed}"
            outcomes["read"] += 1
    assert min(outcomes.values()) > 50


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_one_number_may_have_any_stride(dtype: torch.dtype) -> None:
    column = torch.ones(1, 2, dtype=dtype)[:, 0]
    message, data = describe(column)
    assert torch.equal(TensorReader(torch.frombuffer(bytearray(data), dtype=torch.uint8)).take(message), column)
