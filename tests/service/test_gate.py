"""A server that is full, or closing, says so, and still answers short calls."""

import threading
import time
from collections.abc import Iterator

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

import gradbank
from gradbank import losses
from gradbank.errors import LimitExceeded, ServerUnavailable
from gradbank.v1 import session_pb2, session_pb2_grpc, stats_pb2, stats_pb2_grpc
from gradbank_server.service import Server
from gradbank_server.service.gate import Gate
from gradbank_server.settings import ServerSettings


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 4), torch.arange(8) // 2


@pytest.fixture
def one_stream() -> Iterator[Server]:
    with Server(ServerSettings(port=0, metrics_port=-1, max_streams=1)) as server:
        yield server


def test_a_server_full_of_streams_is_still_healthy_and_tells_its_statistics(one_stream: Server) -> None:
    address = one_stream.address
    with gradbank.connect(address, timeout=5) as client, grpc.insecure_channel(address) as channel:
        first, second = (client.open(name, losses.ContrastiveLoss()) for name in "ab")
        first(*batch())
        with pytest.raises(LimitExceeded, match=r"all 1 streams are taken; .*--max-streams"):
            second(*batch())
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        assert client.stats("a").steps == 1
        assert isinstance(first.local(), losses.ContrastiveLoss)  # and hands out what was learned


def test_closing_a_session_gives_its_stream_back(one_stream: Server) -> None:
    with gradbank.connect(one_stream.address, timeout=5) as client:
        for turn in range(4):
            answered(client.open(f"run-{turn}", losses.ContrastiveLoss()))
            client.close_session(f"run-{turn}")


def test_a_loss_that_is_closed_gives_its_stream_to_another(one_stream: Server) -> None:
    with gradbank.connect(one_stream.address, timeout=5) as client:
        first, second = (client.open(name, losses.ContrastiveLoss()) for name in "ab")
        answered(first)
        first.close()
        answered(second)


def answered(loss_fn: gradbank.RemoteLoss) -> None:
    """Steps, once the server has noticed that the stream before has ended."""
    for _ in range(50):
        try:
            assert loss_fn(*batch()).isfinite()
            return
        except LimitExceeded:
            time.sleep(0.05)
    raise AssertionError("the stream was not given back")


def test_nobody_is_let_in_once_it_closes() -> None:
    gate = Gate(streams=1)
    gate.check()
    gate.closing.set()
    with pytest.raises(ServerUnavailable, match="shutting down"):
        gate.check()


def test_a_large_session_in_the_making_does_not_hold_up_another(server: Server) -> None:
    """Sessions are found while another is built: the lock is not held over the making of weights."""
    sessions = server.service.sessions
    building, go_on = threading.Event(), threading.Event()
    build = sessions._build

    def slow(spec):  # type: ignore[no-untyped-def]
        made = build(spec)
        if spec.arguments.get("num_classes") == 77 and not next(made.parameters()).is_meta:
            building.set()
            go_on.wait(10)
        return made

    sessions._build = slow
    try:
        sessions.create("gate-small", losses.ContrastiveLoss().spec(), {})
        maker = threading.Thread(target=sessions.create, args=("gate-large", losses.ArcFaceLoss(77, 4).spec(), {}))
        maker.start()
        assert building.wait(10)
        assert sessions["gate-small"].name == "gate-small"
        go_on.set()
        maker.join(10)
        assert sessions["gate-large"].weight_bytes == 77 * 4 * 4
    finally:
        go_on.set()
        sessions._build = build
        sessions.close("gate-small")
        sessions.close("gate-large")


@pytest.mark.parametrize("interval_s", [600, float("inf")])
def test_a_watch_that_was_given_up_gives_its_place_back(one_stream: Server, interval_s: float) -> None:
    with (
        gradbank.connect(one_stream.address, timeout=5) as client,
        grpc.insecure_channel(one_stream.address) as channel,
    ):
        loss_fn = client.open("a", losses.ContrastiveLoss())
        request = stats_pb2.WatchStatsRequest(session="a", interval_s=interval_s)
        call = stats_pb2_grpc.StatsServiceStub(channel).WatchStats(request)
        assert next(call).stats.session == "a"
        call.cancel()
        answered(loss_fn)


def test_a_watch_ends_with_its_session_however_long_its_interval(one_stream: Server) -> None:
    with (
        gradbank.connect(one_stream.address, timeout=5) as client,
        grpc.insecure_channel(one_stream.address) as channel,
    ):
        client.open("a", losses.ContrastiveLoss())
        request = stats_pb2.WatchStatsRequest(session="a", interval_s=600)
        call = stats_pb2_grpc.StatsServiceStub(channel).WatchStats(request, timeout=20)
        next(call)
        client.close_session("a")
        assert list(call) == []


def test_calls_that_say_nothing_do_not_keep_a_server_from_answering(one_stream: Server) -> None:
    silent = threading.Event()

    def says_nothing() -> Iterator[session_pb2.CreateSessionRequest]:
        silent.wait(20)
        yield from ()

    with grpc.insecure_channel(one_stream.address) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        calls = [stub.CreateSession.future(says_nothing()) for _ in range(40)]
        refused = [call for call in calls[1:] if call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert len(refused) >= 38  # all but one, whichever that is
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        silent.set()
