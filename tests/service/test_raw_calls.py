"""What a client that somebody wrote in another language runs into: each call is answered, and says what to do."""

import threading
import time
from collections.abc import Iterator

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from torch import Tensor

import gradbank
from gradbank import losses, reducers
from gradbank.v1 import session_pb2, session_pb2_grpc, step_pb2
from gradbank_server.service import Server
from gradbank_server.service.gate import Gate
from gradbank_server.settings import ServerSettings

from .conftest import Wire


def batch(rows: int = 8, columns: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, columns).to(dtype), torch.arange(rows) // 2


def asked(wire: Wire, step: step_pb2.StepInput, payload: bytes) -> step_pb2.StepResponse:
    return wire.steps.Step(step_pb2.StepRequest(step=step, payload=payload), timeout=20)


def refused(wire: Wire, step: step_pb2.StepInput, payload: bytes) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        asked(wire, step, payload)
    return caught.value.code().name, caught.value.details()


def test_a_retry_may_know_more_of_other_steps(plain: Wire) -> None:
    first = asked(plain, *plain.step(*batch()))
    assert not first.step.HasField("error")
    plain.seq = 1
    step, payload = plain.step(*batch())
    answer = asked(plain, step, payload)
    step.answered_seq = 1
    step.trainer_timings.client_encode_s = 0.25
    again = asked(plain, step, payload)
    assert again.step.replayed
    assert (again.step.loss, again.payload) == (answer.step.loss, answer.payload)
    step.embeddings_need_gradient = False
    assert refused(plain, step, payload)[0] == "FAILED_PRECONDITION", "all else is what was asked"


def test_a_step_that_says_more_than_the_server_knows_is_refused(plain: Wire) -> None:
    """A field of a newer version would be left undone otherwise, and the trainer told that all was well."""
    field = bytes([0xF8, 0x7F, 1])  # number 2047 is 1
    event = step_pb2.WeightEvent(backward=step_pb2.Backward(seq=1))
    for part in ("step", "embeddings", "event", "backward"):
        step, payload = plain.step(*batch())
        step.weight_events.append(event)
        of = {"step": step, "embeddings": step.embeddings, "event": step.weight_events[0]}
        of.get(part, step.weight_events[0].backward).MergeFromString(field)
        code, message = refused(plain, step, payload)
        assert code == "INVALID_ARGUMENT"
        assert "run the same version of gradbank on both sides" in message, part


def test_a_step_whose_answer_fits_no_message_is_not_carried_out(plain: Wire) -> None:
    large = plain.step(*batch(1024, 1600, torch.float16))
    code, told = refused(plain, *large)
    assert code == "RESOURCE_EXHAUSTED"
    assert "the gradients take 6,553,600 bytes" in told
    assert not asked(plain, *plain.step(*batch())).step.replayed, "its number is free"


def test_numbers_that_are_none_are_told_so(plain: Wire) -> None:
    step, payload = plain.step(*batch())
    step.seq = 0
    assert "steps are numbered from 1: the next step of rank 0 is 1" in refused(plain, step, payload)[1]
    step, payload = plain.step(*batch())
    step.epoch += 5
    told = f"rank 0 is in epoch {plain.epoch}, and {step.epoch} is to come: attach to it first"
    assert refused(plain, step, payload) == ("ABORTED", told)
    step, payload = plain.step(*batch())
    step.rank = 7
    assert "nobody is attached to rank 7" in refused(plain, step, payload)[1]
    step, payload = plain.step(*batch())
    step.embeddings.shape[:] = [1] * 12
    assert "at most 8 dimensions" in refused(plain, step, payload)[1]


def test_labels_without_embeddings_are_refused(plain: Wire) -> None:
    step, payload = plain.step(*batch())
    step.ClearField("embeddings")
    step.payload_bytes = 8 * 8
    code, told = refused(plain, step, payload[-64:])
    assert code == "INVALID_ARGUMENT"
    assert "was `embeddings` forgotten?" in told


def test_sessions_are_listed_whatever_their_components_hold(server: Server, name: str) -> None:
    with gradbank.connect(server.address, via="tcp") as client:
        for i in range(3):
            weights = torch.full((900_000,), float(i))
            client.open(f"{name}-{i}", losses.NTXentLoss(reducer=reducers.ClassWeightedReducer(weights=weights)))
        listed = {each.name: each.loss for each in client.sessions()}
        told = listed[f"{name}-2"].arguments["reducer"].arguments["weights"]
        assert (told.device.type, told.dtype, told.shape) == ("meta", torch.float32, (900_000,))
        for i in range(3):
            client.close_session(f"{name}-{i}")


@pytest.fixture
def few() -> Iterator[Server]:
    with Server(ServerSettings(port=0, metrics_port=-1, max_streams=2, drain_seconds=1)) as running:
        yield running


def is_healthy(address: str) -> bool:
    with grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        told = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    return bool(told.status == health_pb2.HealthCheckResponse.SERVING)


def test_calls_that_nobody_waits_for_leave_the_server_healthy(few: Server) -> None:
    """Each waits for a session whose step takes long, and is given up by who made it."""
    with gradbank.connect(few.address) as client, grpc.insecure_channel(few.address) as channel:
        client.open("busy", losses.NTXentLoss())
        stub = session_pb2_grpc.SessionServiceStub(channel)
        said = []
        with few.service.sessions["busy"]._turn:
            for i in range(120):
                request = session_pb2.AttachSessionRequest(session="busy", rank=i, incarnation=1, nonce=bytes(16))
                with pytest.raises(grpc.RpcError) as caught:
                    stub.AttachSession(request, timeout=0.1)
                said.append(caught.value.details())
            assert is_healthy(few.address)
            assert client.sessions()[0].name == "busy"
        assert any("places for calls that wait for a session are taken" in each for each in said)
        assert torch.isfinite(client.open("busy", losses.NTXentLoss())(*batch()))


def services(call: grpc.Call) -> int:
    """How many are told of; 0 where there is no place for the call."""
    try:
        return len(next(call).list_services_response.service)
    except grpc.RpcError as error:
        if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise
        return 0


def test_idle_reflection_leaves_the_server_healthy(few: Server) -> None:
    over = threading.Event()

    def forever() -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        over.wait(30)

    with grpc.insecure_channel(few.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        calls = [stub.ServerReflectionInfo(forever()) for _ in range(100)]
        said = [told for call in calls if (told := services(call))]
        assert len(said) == 16
        assert is_healthy(few.address)
        over.set()
        for call in calls:
            call.cancel()
        until = time.monotonic() + 10
        while not services(stub.ServerReflectionInfo(forever())):  # once it has noticed
            assert time.monotonic() < until
            time.sleep(0.05)


def test_each_kind_of_place_is_counted_by_itself() -> None:
    gate = Gate(streams=1)
    with gate.stream(), gate.transfer(), gate.turn(), gate.look():
        assert gate.places > 4
