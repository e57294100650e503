"""The wire as any client of any language may use it: how steps are cut up, and what happens when they are cut off."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from gradbank import losses
from gradbank.v1 import session_pb2, session_pb2_grpc, step_pb2, tensor_pb2
from gradbank.wire import ERROR_TRAILER, TensorReader, assembled, component_message, describe, error_of
from gradbank_server.service import Server

from .conftest import Wire

MIB = 2**20


def memory() -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(), 16, 64)


def batch(seed: int, rows: int = 8, columns: int = 16) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=made), torch.randint(0, 4, (rows,), generator=made)


def local(loss_fn: losses.Loss, seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    embeddings, labels = batch(seed, *shape)
    loss = loss_fn(embeddings.requires_grad_(), labels)
    loss.backward()
    assert embeddings.grad is not None
    return loss.detach(), embeddings.grad


def check(answer: step_pb2.StepOutput, payload: bytes, expected: tuple[Tensor, Tensor]) -> None:
    assert not answer.HasField("error"), answer.error
    assert answer.loss == expected[0].item()
    assert torch.equal(TensorReader(assembled([memoryview(payload)])).take(answer.embeddings_gradient), expected[1])


@pytest.fixture
def wire(server: Server, name: str) -> Iterator[Wire]:
    with grpc.insecure_channel(server.address) as channel:
        made = Wire(channel, name, memory())
        yield made
        made.end()


@pytest.mark.parametrize("size", [1, 7, 100, 575, 576, 4096])
def test_a_step_may_be_cut_up_anywhere(wire: Wire, size: int) -> None:
    step, payload = wire.step(*batch(0))
    stream, parts = wire.stream(), [payload[i : i + size] for i in range(0, len(payload), size)]
    stream.send(step, parts[0])
    for part in parts[1:]:
        stream.send(payload=part)
    check(*stream.answer()[:2], local(memory(), 0))


def test_a_step_larger_than_a_message_comes_back_bit_by_bit(plain: Wire) -> None:
    shape = (400, 3000)  # 4.6 MiB
    step, payload = plain.step(*batch(0, *shape))
    stream = plain.stream()
    stream.send(step)  # the header alone
    for start in range(0, len(payload), MIB):
        stream.send(payload=payload[start : start + MIB])
    answer, data, sizes = stream.answer()
    check(answer, data, local(losses.NTXentLoss(), 0, *shape))
    assert len(data) > 4 * MIB
    assert max(sizes) <= MIB


def test_a_stream_goes_on_after_a_step_that_is_refused(wire: Wire) -> None:
    stream, here = wire.stream(), memory()
    bad = batch(0)[0]
    bad[5] = float("nan")
    stream.send(*wire.step(bad, batch(0)[1]))
    answer, data, _ = stream.answer()
    assert (answer.seq, answer.error.type, answer.error.code, data) == (1, "NonFiniteError", "INVALID_ARGUMENT", b"")
    assert "row 5" in answer.error.message
    for seed in (1, 2):
        stream.send(*wire.step(*batch(seed), ahead=seed))
        check(*stream.answer()[:2], local(here, seed))


def test_a_window_of_steps_is_answered_in_order(wire: Wire) -> None:
    stream, here = wire.stream(), memory()
    for seed in range(1, 5):
        stream.send(*wire.step(*batch(seed), ahead=seed))
    for seed in range(1, 5):
        answer, data, _ = stream.answer()
        assert answer.seq == seed
        check(answer, data, local(here, seed))


def test_a_step_by_itself_is_the_same_as_one_of_a_stream(wire: Wire, plain: Wire) -> None:
    here = memory()
    for seed in (1, 2):
        step, payload = wire.step(*batch(seed), ahead=seed)
        response = wire.steps.Step(step_pb2.StepRequest(step=step, payload=payload), timeout=10)
        check(response.step, response.payload, local(here, seed))
    again = wire.steps.Step(step_pb2.StepRequest(step=step, payload=payload), timeout=10)
    assert (again.step.replayed, again.payload) == (True, response.payload)
    step.seq = 9
    with pytest.raises(grpc.RpcError) as caught:
        wire.steps.Step(step_pb2.StepRequest(step=step, payload=payload), timeout=10)
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert dict(caught.value.trailing_metadata())[ERROR_TRAILER]
    assert "step 9 leaves a gap" in str(error_of(caught.value))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (lambda step, data: [(None, data)], "a step begins with a message that has `step`"),
        (lambda step, data: [(step, data + b"x")], "announced 576 bytes, and 577 came"),
        (lambda step, data: [(step, data[:500]), (None, data[400:])], "announced 576 bytes, and 676 came"),
        (lambda step, data: [(step, data[:500]), (step, data)], "step 1 was not complete when the next one began"),
    ],
)
def test_a_stream_that_breaks_the_framing_ends_and_changes_nothing(wire: Wire, messages: Any, message: str) -> None:
    stream = wire.stream()
    for sent in messages(*wire.step(*batch(0))):
        stream.send(*sent)
    code, details = stream.failure()
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert message in details
    assert wire.steps_done() == 0
    fresh = wire.stream()
    fresh.send(*wire.step(*batch(0)))
    check(*fresh.answer()[:2], local(memory(), 0))


def test_sizes_that_do_not_fit_are_refused_by_name(wire: Wire) -> None:
    stream = wire.stream()
    step, payload = wire.step(*batch(0))
    step.embeddings.shape[0] = 9
    stream.send(step, payload)
    assert "the step's tensors take 640 bytes, but its payload has 576" in stream.answer()[0].error.message
    step.payload_bytes = 0
    stream.send(step)
    assert "the step's tensors take 640 bytes, but its payload has 0" in stream.answer()[0].error.message


def test_a_step_without_anything_in_it_is_refused_or_does_nothing(wire: Wire) -> None:
    stream, before = wire.stream(), wire.state()
    stream.send(step_pb2.StepInput(session=wire.name, epoch=wire.epoch, seq=1))
    answer, data, _ = stream.answer()
    assert (answer.seq, data) == (1, b"")
    assert wire.state() == before


@pytest.mark.parametrize(
    "change",
    [
        {"embeddings": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_INT64, shape=[8, 8])},
        {"embeddings": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[128])},
        {"embeddings": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[2, 4, 16])},
        {"embeddings": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_BOOL, shape=[512])},
        {"embeddings": tensor_pb2.Tensor(dtype=99, shape=[8, 16])},
        {"embeddings": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[-8, -16])},
        {"embeddings": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=[1] * 9)},
        {"labels": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT64, shape=[8])},
        {"enqueue_mask": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_BOOL, shape=[0])},
        {"indices": [tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_INT64, shape=[0])]},
        {"answered_seq": 1},
        {"trainer_timings": step_pb2.TrainerTimings(network_s=-1e-9)},
        {"trainer_timings": step_pb2.TrainerTimings(client_decode_s=float("nan"))},
        {"trainer_timings": step_pb2.TrainerTimings(client_encode_s=float("inf"))},
        {"weight_events": [step_pb2.WeightEvent()]},
        {"weight_events": [step_pb2.WeightEvent(optimizer_step=step_pb2.OptimizerStep())]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_no_honest_client_sends_is_refused_as_a_bad_request(wire: Wire, change: dict) -> None:
    stream, before = wire.stream(), wire.state()
    step, payload = wire.step(*batch(0))
    step.MergeFrom(step_pb2.StepInput(**{k: v for k, v in change.items() if k not in ("embeddings", "labels")}))
    for field in ("embeddings", "labels"):
        if field in change:
            getattr(step, field).CopyFrom(change[field])
    stream.send(step, payload)
    assert stream.answer()[0].error.code == "INVALID_ARGUMENT"
    assert wire.state() == before
    stream.send(*wire.step(*batch(0)))
    check(*stream.answer()[:2], local(memory(), 0))


def test_a_message_larger_than_4_mib_is_refused(plain: Wire) -> None:
    step, payload = plain.step(*batch(0, 400, 3000))
    stream = plain.stream()
    stream.send(step, payload)
    assert stream.failure()[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert plain.steps_done() == 0
    fresh = plain.stream()
    fresh.send(*plain.step(*batch(0)))
    check(*fresh.answer()[:2], local(losses.NTXentLoss(), 0))


@pytest.mark.parametrize("half_close", [False, True], ids=["cancelled", "half-closed"])
def test_a_client_that_dies_in_the_middle_of_a_step_changes_nothing(wire: Wire, half_close: bool) -> None:
    here = memory()
    first = wire.stream()
    first.send(*wire.step(*batch(1)))
    check(*first.answer()[:2], local(here, 1))
    wire.seq, before = 1, wire.state()
    step, payload = wire.step(*batch(2))
    for sent in (0, 1, 300, len(payload) - 1):
        dying = wire.stream()
        dying.send(step, payload[:sent])
        if half_close:
            dying.requests.put(None)
            code, told = dying.failure()
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert told == f"step 2 was not complete when the stream ended: {sent} of its {len(payload)} bytes came"
        else:
            time.sleep(0.05)
            dying.call.cancel()
        assert wire.state() == before
        assert wire.steps_done() == 1
    first.send(step, payload)
    check(*first.answer()[:2], local(here, 2))


def test_a_session_is_created_from_a_state_that_is_cut_up_anywhere(server: Server, name: str) -> None:
    arc = losses.ArcFaceLoss(3, 16)
    message, data = describe(arc.W)
    named = [session_pb2.NamedTensor(name="W", tensor=message)]
    header = session_pb2.CreateSessionRequest(name=name, loss=component_message(arc.spec()), state=named)
    parts = [session_pb2.CreateSessionRequest(payload=bytes(data[i : i + 50])) for i in range(0, len(data), 50)]
    with grpc.insecure_channel(server.address) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        for wrong, code in ((parts[:-1], "INVALID_ARGUMENT"), ([*parts, parts[0]], "INVALID_ARGUMENT")):
            with pytest.raises(grpc.RpcError) as caught:
                stub.CreateSession(itertools.chain([header], wrong), timeout=10)
            assert caught.value.code().name == code
        with pytest.raises(grpc.RpcError) as caught:
            stub.CreateSession(iter([]), timeout=10)
        assert "the stream ended before it named a session" in caught.value.details()
        assert stub.CreateSession(itertools.chain([header], parts), timeout=10).created
        pulled = b"".join(p.payload for p in stub.PullState(session_pb2.PullStateRequest(session=name), timeout=10))
    assert pulled == bytes(data)
