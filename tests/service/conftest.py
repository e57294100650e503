"""Services over raw stubs, as a client in any language speaks to them."""

import queue
import secrets
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from torch import Tensor

from gradbank import losses
from gradbank.v1 import session_pb2, session_pb2_grpc, step_pb2, step_pb2_grpc
from gradbank.wire import component_message, describe
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings


class Stream:
    """A stream of steps, one message at a time."""

    def __init__(self, stub: step_pb2_grpc.StepServiceStub) -> None:
        self.requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call = stub.Steps(iter(self.requests.get, None), timeout=30)

    def send(self, step: step_pb2.StepInput | None = None, payload: bytes = b"") -> None:
        self.requests.put(step_pb2.StepsRequest(step=step, payload=payload))

    def answer(self) -> tuple[step_pb2.StepOutput, bytes, list[int]]:
        """The next answer, its payload, and the sizes in which that came."""
        first = next(self.call)
        parts = [first.payload]
        while sum(map(len, parts)) < first.step.payload_bytes:
            parts.append(next(self.call).payload)
        return first.step, b"".join(parts), [len(part) for part in parts]

    def failure(self) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self.answer()
        return caught.value.code(), caught.value.details()


class Wire:
    """A session over raw stubs."""

    def __init__(self, channel: grpc.Channel, name: str, loss: losses.Loss) -> None:
        self.sessions, self.steps = session_pb2_grpc.SessionServiceStub(channel), step_pb2_grpc.StepServiceStub(channel)
        self.name, self.seq, self._open = name, 0, list[Stream]()
        header = session_pb2.CreateSessionRequest(name=name, loss=component_message(loss.spec()))
        assert self.sessions.CreateSession(iter([header]), timeout=10).created
        attach = session_pb2.AttachSessionRequest(session=name, incarnation=1, nonce=secrets.token_bytes(16))
        self.epoch = self.sessions.AttachSession(attach, timeout=10).epoch

    def stream(self) -> Stream:
        self._open.append(Stream(self.steps))
        return self._open[-1]

    def step(self, embeddings: Tensor, labels: Tensor, ahead: int = 1) -> tuple[step_pb2.StepInput, bytes]:
        (first, data), (second, more) = describe(embeddings), describe(labels)
        payload = bytes(data) + bytes(more)
        step = step_pb2.StepInput(
            session=self.name, epoch=self.epoch, seq=self.seq + ahead, payload_bytes=len(payload),
            embeddings=first, labels=second, embeddings_need_gradient=True,
        )  # fmt: skip
        return step, payload

    def state(self) -> bytes:
        parts = self.sessions.PullState(session_pb2.PullStateRequest(session=self.name), timeout=10)
        return b"".join(part.payload for part in parts)

    def steps_done(self) -> int:
        return self.sessions.GetSession(session_pb2.GetSessionRequest(session=self.name), timeout=10).session.steps

    def end(self) -> None:
        for stream in self._open:
            stream.requests.put(None)
            stream.call.cancel()


@pytest.fixture
def plain(server: Server, name: str) -> Iterator[Wire]:
    with grpc.insecure_channel(server.address) as channel:
        made = Wire(channel, f"{name}-plain", losses.NTXentLoss())
        yield made
        made.end()


@pytest.fixture
def own() -> Iterator[Server]:
    """A server whose counters no other test moves."""
    with Server(ServerSettings(port=0, metrics_port=0, drain_seconds=5)) as running:
        yield running


def metrics(server: Server) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=5) as response:
        lines = [line for line in response.read().decode().splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
