"""Components and errors cross the wire as they are, and what is none of them is refused by name."""

import math
import random
import string
from typing import Any

import grpc
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbank import distances, losses, miners, reducers
from gradbank.component import Component
from gradbank.errors import (
    DeadlineExceeded,
    GradbankError,
    InternalError,
    InvalidComponent,
    ServerUnavailable,
    error_classes,
)
from gradbank.spec import Spec
from gradbank.v1 import component_pb2, error_pb2
from gradbank.wire import component_message, error_message, error_of, spec_of, status_of
from gradbank_server.build import build

NAMES = st.text(string.ascii_letters + "_", min_size=1, max_size=8)
PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(max_size=8)
)
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(NAMES, inner, max_size=3),
        st.builds(Spec, NAMES, st.dictionaries(NAMES, inner, max_size=3)),
    ),
    max_leaves=6,
)


def depth(value: Any) -> int:
    if isinstance(value, Spec):
        return 1 + max(map(depth, value.arguments.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 0


@given(st.builds(Spec, NAMES, st.dictionaries(NAMES, VALUES, max_size=4)))
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_a_spec_comes_back_equal(spec: Spec) -> None:
    sent = component_pb2.Component.FromString(component_message(spec).SerializeToString())
    if depth(spec) <= 8:
        assert spec_of(sent) == spec
    else:
        with pytest.raises(InvalidComponent, match="nested"):
            spec_of(sent)


@pytest.mark.parametrize("value", [True, 1, 1.0, 0, False, 0.0, -0.0, math.inf, -math.inf, 5e-324, "", None, [], {}])
def test_a_value_keeps_its_type(value: object) -> None:
    back = spec_of(component_message(Spec("X", {"value": value}))).arguments["value"]
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_tuples_arrive_as_lists_and_tensors_bit_by_bit() -> None:
    tensor = torch.tensor([math.nan, -0.0, 1.5])
    back = spec_of(component_message(Spec("X", {"pair": (1, 2), "tensor": tensor}))).arguments
    assert back["pair"] == [1, 2]
    assert torch.equal(back["tensor"].view(torch.int32), tensor.view(torch.int32))


@pytest.mark.parametrize(
    "component",
    [
        losses.NTXentLoss(0.2, distance=distances.CosineSimilarity()),
        losses.TripletMarginLoss(0.1, distance=distances.LpDistance(p=1)),
        losses.ContrastiveLoss(pos_margin=0.1, reducer=reducers.MeanReducer()),
        losses.CrossBatchMemory(losses.NTXentLoss(), 8, 100, miner=miners.MultiSimilarityMiner(0.2)),
        losses.ArcFaceLoss(3, 8, margin=10.0),
    ],
    ids=lambda component: type(component).__name__,
)
def test_what_is_built_from_the_wire_is_equal(component: Component) -> None:
    made = build(spec_of(component_message(component.spec())))
    assert type(made) is type(component)
    assert made.spec() == component.spec()
    assert made.spec() == made.rebuilt().spec()


@pytest.mark.parametrize("value", [len, object(), 1j, {1, 2}, torch.zeros(1, dtype=torch.complex64), 2**63, -(2**70)])
def test_what_cannot_be_sent_is_refused_by_name(value: object) -> None:
    with pytest.raises(GradbankError) as caught:
        component_message(Spec("SomeLoss", {"things": [1, value]}))
    assert "SomeLoss.things[1]" in str(caught.value) or "complex64" in str(caught.value)


def test_components_nested_too_deep_are_refused_not_recursed_into() -> None:
    spec: Any = Spec("X", {})
    for _ in range(16):
        spec = Spec("X", {"inner": spec})
    assert spec_of(component_message(spec)) == spec
    many: Any = 1
    for _ in range(17):
        many = [many]
    for deeper in (Spec("X", {"inner": spec}), Spec("X", {"list": many})):
        with pytest.raises(InvalidComponent, match="nested"):
            spec_of(component_message(deeper))
    message = component_pb2.Argument(none=True)
    for _ in range(40):
        message = component_pb2.Argument(list=component_pb2.ArgumentList(items=[message]))
    with pytest.raises(InvalidComponent, match="nested more than 16 deep"):
        spec_of(component_pb2.Component(name="X", arguments={"deep": message}))


def test_an_argument_without_a_value_is_named() -> None:
    message = component_pb2.Component(name="X", arguments={"empty": component_pb2.Argument()})
    with pytest.raises(InvalidComponent, match=r"X\.empty has no value"):
        spec_of(message)


def test_no_mutation_of_a_component_is_more_than_a_bad_request() -> None:
    loss = losses.CrossBatchMemory(losses.NTXentLoss(), 8, 100, miner=miners.MultiSimilarityMiner(0.2))
    honest = component_message(loss.spec()).SerializeToString(deterministic=True)
    outcomes = {"built": 0, "refused": 0}
    for seed in range(3000):
        where, raw = random.Random(seed), bytearray(honest)
        for _ in range(where.randint(1, 4)):
            raw[where.randrange(len(raw))] = where.randrange(256)
        try:
            message = component_pb2.Component.FromString(bytes(raw))
        except Exception:  # protobuf itself refuses it: such bytes never arrive
            continue
        try:
            build(spec_of(message))
        except GradbankError as error:
            assert error.code == "INVALID_ARGUMENT", f"seed {seed}"  # noqa: PT017
            outcomes["refused"] += 1
        else:
            outcomes["built"] += 1
    assert min(outcomes.values()) > 20


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", error_classes().values(), ids=lambda error: error.__name__)
def test_an_error_is_raised_again_as_itself(error: type[GradbankError]) -> None:
    back = error_of(error_message(error("what was wanted, what was got, 'what to do'")))
    assert type(back) is error
    assert str(back) == "what was wanted, what was got, 'what to do'"
    assert status_of(back).name == error.code


def test_an_error_of_a_newer_server_is_still_an_error_of_gradbank() -> None:
    back = error_of(error_pb2.Error(type="SomethingNew", code="INTERNAL", message="tell me"))
    assert (type(back), str(back)) == (GradbankError, "tell me")


class Failed(grpc.RpcError):
    """What gRPC raises by itself, when no server of ours had a say."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self.status = code

    def code(self) -> grpc.StatusCode:
        return self.status

    def details(self) -> str:
        return "of gRPC"

    def trailing_metadata(self) -> None:
        return None


@pytest.mark.parametrize("code", grpc.StatusCode)
def test_a_failure_of_grpc_itself_has_a_class_and_keeps_its_words(code: grpc.StatusCode) -> None:
    expected: dict[grpc.StatusCode, type[GradbankError]] = {
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
        grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
        grpc.StatusCode.CANCELLED: ServerUnavailable,
        grpc.StatusCode.RESOURCE_EXHAUSTED: error_classes()["LimitExceeded"],
    }
    error = error_of(Failed(code))
    assert type(error) is expected.get(code, InternalError)
    assert "of gRPC" in str(error)
