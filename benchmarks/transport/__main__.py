"""The round trip of a step through a real server, beside that of its bytes through a plain TCP socket.

    python benchmarks/transport
    python benchmarks/transport --payloads 256x512 --seconds 5

The loss is an echo: its gradient is the embeddings. Server and trainer are two processes on this machine; slices of
each contender take turns in one run, and a figure is the median over rounds of its median over that of the floor in
the same round.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable

import grpc
import peer
import torch
from echo import EchoLoss
from floor import Floor

import gradbank
from gradbank.remote.transport import GrpcSteps
from gradbank.v1 import step_pb2
from gradbank.wire import describe

PAYLOADS = "64x128,256x512,1024x1024"
TARGETS = {"64x128": 4.0, "256x512": 3.3, "1024x1024": 2.0}
_SLICE_S = 0.3

BARE = "a bare gRPC echo"  # by the same frames, without a session behind it

Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payloads", default=PAYLOADS, help="batches, rows x dimension, comma-separated")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long each payload is measured")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=peer.run, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    addresses = ours.recv()
    print(f"gradbank {gradbank.__version__}, torch {torch.__version__}; medians of a step's round trip\n")
    ways = (BARE, *addresses[2])
    print("| batch | each way | plain TCP | " + " | ".join(f"{name}: p50, p99, ratio" for name in ways) + " |")
    print("|---|" + "---|" * (2 + len(ways)))
    try:
        for payload in arguments.payloads.split(","):
            rows, dimension = map(int, payload.split("x"))
            print(_line(payload, _measured(rows, dimension, addresses, arguments.seconds)), flush=True)
    finally:
        ours.send(None)
        process.join(10)


def _measured(
    rows: int, dimension: int, addresses: tuple[int, int, dict[str, str]], seconds: float
) -> dict[str, list[list[float]]]:
    """The times of each contender's steps, slice by slice."""
    embeddings = torch.randn(rows, dimension)
    labels, gradient = torch.randint(1000, (rows,)), torch.empty(rows, dimension)
    port, bare_port, named = addresses
    with Floor(port) as floor, grpc.insecure_channel(f"127.0.0.1:{bare_port}") as channel:
        steps: dict[str, Step] = {"plain TCP": lambda: floor.step(embeddings, labels, gradient)}
        steps[BARE] = _bare(GrpcSteps(channel), embeddings, labels)
        clients = [gradbank.connect(address) for address in named.values()]
        for (name, _), client in zip(named.items(), clients):
            loss_fn = client.open(f"echo-{rows}x{dimension}-{len(steps)}", EchoLoss())
            steps[name] = _step(loss_fn, embeddings.clone().requires_grad_(), labels)
        slices: dict[str, list[list[float]]] = {name: [] for name in steps}
        for step in steps.values():
            _slice(step)  # as a warm-up
        until = time.perf_counter() + seconds
        while not slices[BARE] or time.perf_counter() < until:
            for name, step in steps.items():
                slices[name].append(_slice(step))
        for client in clients:
            client.close()
    return slices


def _bare(stream: GrpcSteps, embeddings: torch.Tensor, labels: torch.Tensor) -> Step:
    """A step without a session: its frames there, and its embeddings back."""
    (first, data), (second, more) = describe(embeddings), describe(labels)
    request = step_pb2.StepInput(embeddings=first, labels=second, payload_bytes=len(data) + len(more))
    _, answer = stream.exchange(request, [data, more], 30)
    if bytes(answer.numpy().data) != bytes(data):
        raise RuntimeError("the echo is not what was sent")
    return lambda: stream.exchange(request, [data, more], 30)


def _step(loss_fn: torch.nn.Module, embeddings: torch.Tensor, labels: torch.Tensor) -> Step:
    def step() -> None:
        embeddings.grad = None
        loss_fn(embeddings, labels).backward()

    step()
    if not torch.equal(embeddings.grad, embeddings):  # type: ignore[arg-type]
        raise RuntimeError("the echo is not what was sent")
    return step


def _slice(step: Step) -> list[float]:
    times, begun = [], time.perf_counter()
    while (now := time.perf_counter()) - begun < _SLICE_S:
        step()
        times.append(time.perf_counter() - now)
    return times


def _line(payload: str, slices: dict[str, list[list[float]]]) -> str:
    floors = slices.pop("plain TCP")
    rows, dimension = map(int, payload.split("x"))
    cells = [payload, f"{rows * dimension * 4 // 1024:,} KiB", f"{_median(floors) * 1e6:,.0f} us"]
    for name, mine in slices.items():
        ratio = statistics.median(statistics.median(a) / statistics.median(b) for a, b in zip(mine, floors))
        last = statistics.median(sorted(a)[len(a) * 99 // 100] for a in mine)
        target = f" (<= {TARGETS[payload]:g})" if payload in TARGETS and name == "gRPC over TCP" else ""
        cells.append(f"{_median(mine) * 1e6:,.0f} us, {last * 1e6:,.0f} us, {ratio:.2f}x{target}")
    return "| " + " | ".join(cells) + " |"


def _median(slices: list[list[float]]) -> float:
    return statistics.median(statistics.median(each) for each in slices)


if __name__ == "__main__":
    main()
