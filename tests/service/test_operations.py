"""What whoever runs a server relies on: health, reflection, metrics, logs, the start and the end."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import structlog
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import gradbank
from gradbank import losses
from gradbank.errors import DeadlineExceeded, LimitExceeded, ServerUnavailable, SessionNotFound
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings

from .conftest import metrics

SERVICES = [f"gradbank.v1.{name}Service" for name in ("Session", "Step", "Stats", "Catalog")]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def batch(seed: int = 0, rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 16, generator=made), torch.randint(0, 4, (rows,), generator=made)


def memory() -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(), 16, 64)


# -- health, reflection, metrics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_every_service_is_healthy(server: Server, service: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        assert health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status == SERVING


def test_reflection_lists_the_services(server: Server) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        answer = next(stub.ServerReflectionInfo(iter([request]), timeout=5))
    listed = {each.name for each in answer.list_services_response.service}
    assert listed == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


def test_reflection_can_be_left_out() -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with Server(ServerSettings(port=0, metrics_port=-1, reflection=False)) as server:
        assert server.metrics_port is None
        with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
            next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=5))
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("limits", "error"),
    [({"max_sessions": 1}, "all 1 sessions are taken"), ({"max_session_bytes": 4000}, "a session may take 4,000")],
    ids=["sessions", "bytes"],
)
def test_a_server_that_is_full_is_seen_to_be(
    limits: dict[str, int], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = structlog.testing.CapturingLogger()
    monkeypatch.setattr("gradbank_server.service.service.log", said)
    settings = ServerSettings(port=0, metrics_port=0, **limits)  # type: ignore[arg-type]
    with Server(settings) as server, gradbank.connect(server.address) as client:
        client.open("small", losses.NTXentLoss())
        with pytest.raises(LimitExceeded, match=error):
            client.open("large", memory())
        assert metrics(server)['gradbank_refusals_total{error="LimitExceeded"}'] == 1
    (line,) = said.calls
    assert (line.method_name, line.args) == ("warning", ("refused by a limit",))
    assert error in line.kwargs["reason"]


def test_news_without_a_batch_is_no_step(own: Server) -> None:
    with gradbank.connect(own.address) as client:
        head = client.open("head", losses.ArcFaceLoss(4, 16))
        optimizer = head.optimizer("SGD", lr=0.1)
        embeddings, labels = batch()
        for _ in range(3):
            optimizer.zero_grad()
            head(embeddings.requires_grad_(), labels).backward()
            optimizer.step()
        assert metrics(own)["gradbank_gradient_bytes"] > 0
        head.flush()
        assert client.stats("head").steps == 3
        assert client.stats("head").optimizer_steps == 3
    seen = metrics(own)
    assert seen['gradbank_steps_total{loss="ArcFaceLoss",outcome="ok"}'] == 3
    assert seen['gradbank_steps_total{loss="ArcFaceLoss",outcome="told"}'] == 1


def test_the_dashboard_asks_for_metrics_that_exist(own: Server) -> None:
    dashboard = Path(__file__).parents[2] / "docker/grafana/dashboards/gradbank.json"
    asked = set(re.findall(r"\bgradbank_[a-z_]+", dashboard.read_text()))
    with gradbank.connect(own.address, timeout=10) as client:
        client.open("run", memory())(*batch())
        with pytest.raises(SessionNotFound):
            client.stats("another")
    known = {name.partition("{")[0] for name in metrics(own)}
    assert asked
    assert asked - known == set()


# -- the end ----------------------------------------------------------------------------------------------------------


def test_a_server_that_drains_finishes_the_step_under_way_and_refuses_the_next(own: Server) -> None:
    with gradbank.connect(own.address, timeout=10) as client, grpc.insecure_channel(own.address) as channel:
        there = client.open("run", memory())
        there(*batch())
        session, health = own.service.sessions["run"], health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == SERVING
        session._turn.acquire()  # a step is under way
        stopping = threading.Thread(target=own.stop)
        stopping.start()
        while health.Check(health_pb2.HealthCheckRequest(), timeout=5).status == SERVING:
            time.sleep(0.01)
        assert health.Check(health_pb2.HealthCheckRequest(service=SERVICES[1]), timeout=5).status == NOT_SERVING
        there.producer.timeout = 0.5
        with pytest.raises(ServerUnavailable, match="shutting down; nothing was carried out"):
            there(*batch(1))
        assert stopping.is_alive()
        session._turn.release()
        stopping.join(5)
        assert not stopping.is_alive()
        assert session.tally.steps == 1


# -- the command ------------------------------------------------------------------------------------------------------


class Process:
    """`gradbank serve`, its first lines read."""

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "gradbank_server", "serve", "--port", "0", "--metrics-port", "0", *flags]
        self.running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.running.stdout is not None
        self.said = ""
        for line in self.running.stdout:
            self.said += line
            if "client" in line:
                break
        self.address = re.search(r"listening +(\S+)", self.said)[1]  # type: ignore[index]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, float, str]:
        """The exit code, the seconds it took, and what was logged."""
        begun = time.monotonic()
        self.running.send_signal(number)
        errors = self.running.communicate(timeout=30)[1]
        return self.running.returncode, time.monotonic() - begun, errors


@pytest.fixture
def serve() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(*flags: str) -> Process:
        started.append(Process(*flags))
        return started[-1]

    yield start
    for each in started:
        each.running.kill()
        each.running.communicate()


def test_serve_says_where_and_how_and_ends_in_order(serve: Callable[..., Process]) -> None:
    process = serve("--max-sessions", "7", "--max-session-bytes", str(2**30), "--device", "cpu")
    assert f"gradbank {gradbank.__version__}" in process.said
    assert re.search(r"device +cpu", process.said)
    assert re.search(r"limits +7 sessions, 1 GiB each, 256 MiB a step", process.said)
    page = re.search(r"metrics +(http://127.0.0.1:\d+/metrics)", process.said)
    with urllib.request.urlopen(page[1], timeout=5) as response:  # type: ignore[index]
        assert b"gradbank_sessions 0.0" in response.read()
    line = re.search(r"client +(.+)", process.said)[1]  # type: ignore[index]
    space = {"gradbank": gradbank, "loss_fn": memory()}
    exec(line, space)  # it can be pasted
    there, here = space["loss_fn"], memory()
    assert isinstance(there, gradbank.RemoteLoss)
    assert torch.equal(there(*batch()), here(*batch()))  # and leaves a stream open
    code, seconds, errors = process.end()
    assert code == 0
    assert seconds < 8
    logged = [json.loads(each) for each in errors.splitlines()]
    assert [each["event"] for each in logged] == [
        "session created", "trainer attached", "draining", "stopped",
    ]  # fmt: skip
    assert all(each["level"] == "info" and each["timestamp"].endswith("Z") for each in logged)
    assert (logged[0]["session"], logged[0]["loss"]) == ("my-run", "CrossBatchMemory")
    there.producer.timeout = 0.5
    with pytest.raises(ServerUnavailable):
        there(*batch(1))
    there.producer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is told by /proc")
def test_what_a_session_held_is_the_systems_again_once_it_is_closed(serve: Callable[..., Process]) -> None:
    process = serve("--device", "cpu")

    def held() -> int:
        status = Path(f"/proc/{process.running.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 2**10  # type: ignore[index]

    with gradbank.connect(process.address) as client:
        for rank in range(3):
            head = client.open("head", losses.ArcFaceLoss(50_000, 64), rank=rank)  # 12 MiB of weights
            head.optimizer("Adam", lr=0.1)
            for _ in range(4):
                head(torch.randn(8, 64).requires_grad_(), torch.arange(8))
        before = held()
        gradients = 3 * 4 * client.stats("head").weight_bytes
        client.close_session("head")
        assert before - held() > gradients


def test_ctrl_c_ends_in_order_too(serve: Callable[..., Process]) -> None:
    code, seconds, errors = serve("--log-level", "warning").end(signal.SIGINT)
    assert (code, errors) == (0, "")
    assert seconds < 8


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gradbank_server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--host", "0.0.0.0"], "neither TLS nor authentication yet. Put it behind .* add --insecure"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "this machine has . CUDA devices"),
    ],
)
def test_what_cannot_start_says_why(flags: list[str], message: str) -> None:
    ended = run("serve", "--port", "0", "--metrics-port", "-1", *flags)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert re.search(message, " ".join(ended.stderr.split()))
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_port_in_use_is_named(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flags = {"--port": "0", "--metrics-port": "-1", flag: port}
        ended = run("serve", *(word for pair in flags.items() for word in pair))
    assert ended.returncode == 2
    assert re.search(rf"cannot listen .*{port}: Address already in use; choose another {flag}", ended.stderr)
    assert "Traceback" not in ended.stderr


def test_an_address_of_another_machine_is_named() -> None:
    ended = run("serve", "--host", "192.0.2.7", "--insecure", "--port", "0", "--metrics-port", "-1")
    assert ended.returncode == 2
    assert re.search(r"cannot listen on 192\.0\.2\.7:0: .*; --host must be an address of this machine", ended.stderr)


def test_health_is_an_exit_code(server: Server) -> None:
    well = run("health", "--address", server.address)
    assert (well.returncode, well.stdout.strip()) == (0, f"{server.address}: SERVING")
    assert run("health", "--address", server.address, "--timeout", "inf").returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    ill = run("health", "--address", address, "--timeout", "0.5")
    assert ill.returncode == 1
    assert address in ill.stdout + ill.stderr


def test_health_needs_no_torch(server: Server) -> None:
    asked = f"import sys; from gradbank_server.cli import health; print(health(address={server.address!r}))"
    ended = subprocess.run(
        [sys.executable, "-c", f"{asked}; print('torch' in sys.modules)"], capture_output=True, text=True, timeout=60
    )
    assert ended.stdout.split()[-2:] == ["0", "False"]


@pytest.mark.parametrize("closed", [False, True])
def test_a_step_that_outlasts_the_time_to_drain_does_not_keep_the_process(
    serve: Callable[..., Process], closed: bool
) -> None:
    process = serve("--drain-seconds", "0.5", "--device", "cpu")  # a GPU would be done in time
    with gradbank.connect(process.address, timeout=2) as client:
        loss_fn = client.open("long", losses.NTXentLoss())
        with pytest.raises((DeadlineExceeded, ServerUnavailable)):  # 60,000 million pairs
            loss_fn(torch.randn(250_000, 1), torch.arange(250_000) // 2)
        if closed:
            with pytest.raises((DeadlineExceeded, ServerUnavailable)):
                client.close_session("long")
        code, seconds, errors = process.end()
    assert code == 1
    assert errors.endswith("gradbank: a step outlasted --drain-seconds, and was given up\n")
    assert seconds < 8
