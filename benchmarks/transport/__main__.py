"""The round trip of a step through a real server, beside that of its bytes through a plain socket or plain memory.

    python benchmarks/transport
    python benchmarks/transport --payloads 256x512 --seconds 5

The loss is an echo: its gradient is the embeddings. Server and trainer are two processes on this machine; slices of
each contender take turns in one run, and a ratio is the median over rounds of its median over that of its floor in
the same round: shared memory for what goes through shared memory, and TCP for all else.
"""

import argparse
import multiprocessing
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import grpc
import peer
import torch
from echo import EchoLoss
from floor import Floor
from served import served
from shared_floor import SharedFloor

import gradbank
from gradbank.protocol import WINDOW
from gradbank.remote.future import StepFuture
from gradbank.remote.ladder import Via
from gradbank.remote.stream import GrpcSteps
from gradbank.v1 import step_pb2
from gradbank.wire import describe

PAYLOADS = "64x128,256x512,1024x1024"
_SLICE_S = 0.3

TCP, SHARED = "plain TCP", "plain shared memory"  # the floors
BARE = "a bare gRPC echo"  # by the same frames, without a session behind it
WAYS: dict[str, Via] = {"gRPC over TCP": "tcp", "over a unix socket": "unix", "through shared memory": "shm"}
FLOORS = {"through shared memory": SHARED}  # of the ways, and of the bare echo, where it is not plain TCP
TARGETS = {  # by way, times its floor
    "gRPC over TCP": {"64x128": 4.0, "256x512": 3.3, "1024x1024": 2.0},
    "through shared memory": {"64x128": 1.5, "256x512": 1.5, "1024x1024": 1.3},
}

Step = Callable[[], object]
Slices = dict[str, list[list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payloads", default=PAYLOADS, help="batches, rows x dimension, comma-separated")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long each payload is measured")
    arguments = parser.parse_args()
    with _floors() as places, served() as address:
        print(f"gradbank {gradbank.__version__}, torch {torch.__version__}; medians of a step's round trip\n")
        ways = (BARE, *WAYS)
        print(
            f"| batch | each way | {TCP} | {SHARED} | " + " | ".join(f"{name}: p50, p99, ratio" for name in ways) + " |"
        )
        print("|---|" + "---|" * (3 + len(ways)))
        for payload in arguments.payloads.split(","):
            rows, dimension = map(int, payload.split("x"))
            print(_line(payload, _measured(rows, dimension, places, address, arguments.seconds)), flush=True)
        print(f"\nSteps a second, one at a time and with {WINDOW} in flight\n")
        print("| batch | " + " | ".join(WAYS) + " |\n|---|" + "---|" * len(WAYS))
        for payload in arguments.payloads.split(","):
            rows, dimension = map(int, payload.split("x"))
            rates = _rates(rows, dimension, address, arguments.seconds)
            print("| " + " | ".join([payload, *(f"{one:,.0f}, {more:,.0f}" for one, more in rates)]) + " |", flush=True)


@contextmanager
def _floors() -> Iterator[peer.Places]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=peer.run, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join(10)


def _measured(rows: int, dimension: int, places: peer.Places, address: str, seconds: float) -> Slices:
    """The times of each contender's steps, slice by slice."""
    embeddings = torch.randn(rows, dimension)
    labels, gradient = torch.randint(1000, (rows,)), torch.empty(rows, dimension)
    with ExitStack() as open_:
        floors = {TCP: Floor(places.tcp_floor), SHARED: SharedFloor(places.shared_floor)}
        steps: dict[str, Step] = {}
        for name, floor in floors.items():
            steps[name] = partial(open_.enter_context(floor).step, embeddings, labels, gradient)
            steps[name]()
            if not torch.equal(gradient, embeddings):
                raise RuntimeError("the floor's echo is not what was sent")
            gradient.zero_()
        channel = open_.enter_context(grpc.insecure_channel(f"127.0.0.1:{places.bare}"))
        bare = GrpcSteps(channel, threading.Event(), interrupted=lambda: None, late=lambda: None)
        steps[BARE] = _bare(bare, embeddings, labels)
        for name, via in WAYS.items():
            client = open_.enter_context(gradbank.connect(address, via=via))
            loss_fn = client.open(f"echo-{rows}x{dimension}-{via}", EchoLoss())
            steps[name] = _step(loss_fn, embeddings.clone().requires_grad_(), labels)
        slices: Slices = {name: [] for name in steps}
        for step in steps.values():
            _slice(step)  # as a warm-up
        until = time.perf_counter() + seconds
        while not slices[BARE] or time.perf_counter() < until:
            for name, step in steps.items():
                slices[name].append(_slice(step))
    return slices


def _rates(rows: int, dimension: int, address: str, seconds: float) -> list[tuple[float, float]]:
    """How many steps a second each way takes, if each waits for the one before it, and if they need not."""
    embeddings, labels = torch.randn(rows, dimension, requires_grad=True), torch.randint(1000, (rows,))
    with ExitStack() as open_:
        runs: dict[tuple[str, int], Callable[[], int]] = {}
        for via in WAYS.values():
            client = open_.enter_context(gradbank.connect(address, via=via))
            loss_fn = client.open(f"rate-{rows}x{dimension}-{via}", EchoLoss())
            for window in (1, WINDOW):
                runs[via, window] = partial(_in_flight, loss_fn, embeddings, labels, window)
        found: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
        until = time.perf_counter() + seconds
        while not found["tcp", 1] or time.perf_counter() < until:
            for key, run in runs.items():
                begun = time.perf_counter()
                number = run()
                found[key].append(number / (time.perf_counter() - begun))
    medians = {key: statistics.median(rates) for key, rates in found.items()}
    return [(medians[via, 1], medians[via, WINDOW]) for via in WAYS.values()]


def _in_flight(loss_fn: gradbank.RemoteLoss, embeddings: torch.Tensor, labels: torch.Tensor, window: int) -> int:
    """How many steps, of which so many are in flight at a time, are answered in a slice."""
    waiting: deque[StepFuture] = deque()
    number, until = 0, time.perf_counter() + _SLICE_S
    while True:
        while len(waiting) < window and (not number or time.perf_counter() < until):
            waiting.append(loss_fn.submit(embeddings, labels))
            number += 1
        if not waiting:
            return number
        embeddings.grad = None
        waiting.popleft().result().backward()


def _bare(stream: GrpcSteps, embeddings: torch.Tensor, labels: torch.Tensor) -> Step:
    """A step without a session: its frames there, and its embeddings back."""
    (first, data), (second, more) = describe(embeddings), describe(labels)
    request = step_pb2.StepInput(embeddings=first, labels=second, payload_bytes=len(data) + len(more))

    def step() -> torch.Tensor:
        stream.send(request, [data, more], 30)
        return stream.receive(30)[1]

    answer = step()
    if bytes(answer.numpy().data) != bytes(data):
        raise RuntimeError("the echo is not what was sent")
    return step


def _step(loss_fn: torch.nn.Module, embeddings: torch.Tensor, labels: torch.Tensor) -> Step:
    def step() -> None:
        embeddings.grad = None
        loss_fn(embeddings, labels).backward()

    step()
    if not torch.equal(embeddings.grad, embeddings):  # type: ignore[arg-type]  # a backward pass made it
        raise RuntimeError("the echo is not what was sent")
    return step


def _slice(step: Step) -> list[float]:
    times, begun = [], time.perf_counter()
    while (now := time.perf_counter()) - begun < _SLICE_S:
        step()
        times.append(time.perf_counter() - now)
    return times


def _line(payload: str, slices: Slices) -> str:
    rows, dimension = map(int, payload.split("x"))
    cells = [payload, f"{rows * dimension * 4 // 1024:,} KiB"]
    cells += [f"{_median(slices[floor]) * 1e6:,.0f} us" for floor in (TCP, SHARED)]
    for name in (BARE, *WAYS):
        mine, floors = slices[name], slices[FLOORS.get(name, TCP)]
        ratio = statistics.median(statistics.median(a) / statistics.median(b) for a, b in zip(mine, floors))
        last = statistics.median(sorted(a)[len(a) * 99 // 100] for a in mine)
        target = TARGETS.get(name, {}).get(payload)
        of = f" (<= {target:g})" if target else ""
        cells.append(f"{_median(mine) * 1e6:,.0f} us, {last * 1e6:,.0f} us, {ratio:.2f}x{of}")
    return "| " + " | ".join(cells) + " |"


def _median(slices: list[list[float]]) -> float:
    return statistics.median(statistics.median(each) for each in slices)


if __name__ == "__main__":
    main()
