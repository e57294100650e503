"""Where the time of a step goes, on a server of the user's own and over his own network."""

import itertools
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

import gradbank
from gradbank import losses
from gradbank.errors import LimitExceeded
from gradbank.losses.loss import Loss
from gradbank.remote.client import Client
from gradbank.remote.ladder import Via
from gradbank.remote.loss import RemoteLoss

# of a step, in the order in which they happen: where each lies, and what it is
PHASES = {
    "client_encode": ("here", "tensors to bytes"),
    "network": ("between", "the way there and back: gRPC or shared memory, system, wire"),
    "queue": ("server", "waiting for the session's turn"),
    "decode": ("server", "bytes to tensors"),
    "compute": ("server", "loss, gradient and bank"),
    "encode": ("server", "tensors to bytes"),
    "client_decode": ("here", "bytes to tensors"),
}
_WARM_UP = 10  # steps
_CLASSES = 1000


@dataclass(frozen=True)
class Workload:
    """What is sent: batches of `rows` x `dimension` float32, four rows of each class, for an NTXentLoss, against a bank
    of so many rows (0 is the batch itself)."""

    rows: int
    dimension: int
    bank: int
    steps: int

    def loss(self) -> Loss:
        """With its bank full, as it is for all but the first steps of a training."""
        if not self.bank:
            return losses.NTXentLoss()
        made = losses.CrossBatchMemory(losses.NTXentLoss(), self.dimension, self.bank)
        generator = torch.Generator().manual_seed(1)
        made.add_to_memory(
            torch.randn(self.bank, self.dimension, generator=generator), torch.arange(self.bank) // 4 % _CLASSES
        )
        return made

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Without end; no two are alike, and they go through the classes in turn, as the bank's rows do."""
        generator = torch.Generator().manual_seed(0)
        for start in itertools.count(0, self.rows):
            labels = torch.arange(start, start + self.rows) // 4 % _CLASSES
            yield torch.randn(self.rows, self.dimension, generator=generator).requires_grad_(), labels

    @property
    def nbytes(self) -> int:
        return self.rows * self.dimension * 4

    def __str__(self) -> str:
        against = f"a bank of {self.bank:,} rows" if self.bank else "itself"
        return f"{self.rows:,} x {self.dimension:,} float32 ({self.nbytes / 2**20:.3g} MiB each way) against {against}"


@dataclass(frozen=True)
class Course:
    """What was measured, in seconds.

    Attributes:
        phases: by phase, of every step; steps: of every call as a whole.
        empty: of calls that carry nothing, which is the least that a step can take over this connection.
        here: of the same loss computed in this process.
    """

    phases: dict[str, list[float]]
    steps: list[float]
    empty: list[float]
    here: list[float]

    @property
    def step_s(self) -> float:
        return statistics.median(self.steps)

    def advice(self) -> str:
        """What would make a step shorter, by what takes most of it."""
        medians = {phase: statistics.median(times) for phase, times in self.phases.items()}
        most = max(medians, key=lambda phase: medians[phase])
        share = f"{100 * medians[most] / self.step_s:.0f} %"
        here = statistics.median(self.here)
        if most == "network":
            return (
                f"The way there and back takes {share} of a step. On one machine, a server with --shared-memory is the "
                "quickest to reach, and local:// needs no server at all. Embeddings in bfloat16 are half the bytes; a "
                "larger batch spreads what each step costs whatever its size."
            )
        if most == "queue":
            return (
                f"{share} of a step is waiting for other trainers of the session: they take turns. Give each a session "
                "of its own where they need not share a bank."
            )
        if most == "compute":
            nearer = "here" if here < medians[most] else "there"
            return (
                f"The loss itself takes {share} of a step, {1e3 * medians[most]:.3g} ms there and {1e3 * here:.3g} ms "
                f"here: it is faster {nearer}. A GPU at the server, or more threads (OMP_NUM_THREADS), shortens it."
            )
        return f"{PHASES[most][1].capitalize()} ({PHASES[most][0]}) takes {share} of a step: look for a busy processor."


def bench(address: str, timeout: float, workload: Workload, via: Via = "auto") -> tuple[Course, str]:
    """Measures a workload on the server at `address`, in a session of its own that it closes; and says what server
    that is, and which way it went to it.

    Raises:
        GradbankError: the server cannot be reached, or does not take the workload.
    """
    with gradbank.connect(address, timeout, via) as client:
        info = client.server()
        if workload.bank * (workload.dimension * 4 + 8) > info.max_session_bytes:  # before it is made here
            raise LimitExceeded(
                f"{workload} does not fit the server, of which a session may take {info.max_session_bytes:,} bytes; "
                "choose a smaller --bank or --dimension"
            )
        empty = [_seconds(client.server) for _ in range(50)]
        with _session(client, workload.loss()) as loss_fn:
            phases: dict[str, list[float]] = {phase: [] for phase in PHASES}
            steps = []
            for number, (embeddings, labels) in zip(range(_WARM_UP + workload.steps), workload.batches()):
                begun = time.perf_counter()
                loss_fn(embeddings, labels)
                if number >= _WARM_UP:
                    steps.append(time.perf_counter() - begun)
                    for phase, times in phases.items():
                        times.append(loss_fn.timings[phase])
        way = client.via
    here, loss = [], workload.loss()
    for _, batch in zip(range(_WARM_UP + min(workload.steps, 20)), workload.batches()):
        here.append(_seconds(partial(loss, *batch)))
    return Course(phases, steps, empty, here[_WARM_UP:]), f"gradbank {info.version} on {info.device}, via {way}"


@contextmanager
def _session(client: Client, loss: Loss) -> Iterator[RemoteLoss]:
    name = f"bench-{secrets.token_hex(6)}"
    try:
        yield client.open(name, loss)
    finally:
        client.close_session(name)


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
