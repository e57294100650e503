"""How much memory a step takes, on either side, and whether many steps take more than a few.

    python benchmarks/transport/memory.py
    python benchmarks/transport/memory.py --steps 100000

The loss is an echo. `a step` is the peak of a process while steps of a batch are made, above what it held before the
first, in payloads: 1 is the size of the batch, whose gradient is there already here. `drift` is what it holds after
many small steps, above what it held after the first hundredth of them.
"""

import argparse
import ctypes
import gc
import os
import time
from pathlib import Path

import torch
from echo import EchoLoss
from served import served

import gradbank
from gradbank.remote.ladder import Via

WAYS: tuple[Via, ...] = ("tcp", "unix", "shm")
BATCHES = {"1024x1024": torch.float32, "32768x1024": torch.bfloat16, "65536x512": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default=",".join(BATCHES), help="rows x dimension, comma-separated")
    parser.add_argument("--steps", type=int, default=10_000, help="how many small ones")
    arguments = parser.parse_args()
    print("| batch | payload | via | a step here | a step at the server | seconds |\n|---|" + 5 * "---|")
    for batch in arguments.batches.split(","):
        for via in WAYS:
            with served() as address:
                _large(batch, via, address)
    print(f"\n| {arguments.steps:,} steps of 32 KiB | drift here | drift at the server |\n|---|---|---|")
    for via in WAYS:
        with served() as address, gradbank.connect(address, via=via) as client:
            _many(client, via, arguments.steps)


def _large(batch: str, via: Via, address: str) -> None:
    rows, dimension = map(int, batch.split("x"))
    embeddings = torch.randn(rows, dimension).to(BATCHES.get(batch, torch.float32)).requires_grad_()
    embeddings.grad = torch.ones_like(embeddings)
    with gradbank.connect(address, 120, via=via) as client:
        small = client.open("small", EchoLoss())
        small(torch.randn(64, 128, requires_grad=True), torch.arange(64)).backward()
        loss_fn, server, labels = client.open("large", EchoLoss()), _server(), torch.zeros(rows, dtype=torch.int64)
        before, times = [_start_of_peak(process) for process in ("self", server)], []
        for _ in range(3):
            embeddings.grad = None
            begun = time.perf_counter()
            loss_fn(embeddings, labels).backward()
            times.append(time.perf_counter() - begun)
        extra = [_status(p, "VmHWM") - b for p, b in zip(("self", server), before)]
    size = embeddings.nbytes
    cells = [batch, f"{size / 2**20:.0f} MiB", via, *(f"{each / size:.1f}" for each in extra), f"{min(times):.2f} s"]
    print("| " + " | ".join(cells) + " |", flush=True)


def _many(client: gradbank.Client, via: Via, steps: int) -> None:
    loss_fn = client.open("many", EchoLoss())
    embeddings, labels = torch.randn(64, 128, requires_grad=True), torch.arange(64)
    held: list[int] = []
    for number in range(steps):
        if number == steps // 100:
            held = [_status(process, "VmRSS") for process in ("self", _server())]
        embeddings.grad = None
        loss_fn(embeddings, labels).backward()
    drift = [_status(p, "VmRSS") - h for p, h in zip(("self", _server()), held)]
    print(f"| {via} | " + " | ".join(f"{each / 2**20:.1f} MiB" for each in drift) + " |", flush=True)


def _server() -> str:
    """The server's process, a child of this one."""
    (only,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return only


def _start_of_peak(process: str) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path(f"/proc/{process}/clear_refs").write_text("5")
    return _status(process, "VmRSS")


def _status(process: str, key: str) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


if __name__ == "__main__":
    main()
