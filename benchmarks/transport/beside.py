"""How long a small step takes beside a trainer whose steps are large.

    python benchmarks/transport/beside.py

A small step (NTXent, 64 x 128) is measured by itself; while another process trains against a bank in a session of its
own, on the same server; and while that one trains on another server on this machine. The last two share processors with
the large step alike, but only the first shares a Python interpreter with it: what it takes longer is the lock's share.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from served import served

import gradbank
from gradbank import losses
from gradbank.remote.ladder import Via

WAYS: tuple[Via, ...] = ("tcp", "shm")
_SLICE_S = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2048, help="rows of the large step")
    parser.add_argument("--bank", type=int, default=65_536, help="rows that they are compared with")
    parser.add_argument("--slices", type=int, default=8, help="how often each is measured, for a second")
    arguments = parser.parse_args()
    print("| small step | by itself: p50, p99 | beside a large one: p50, p99, most | with that one on another server |")
    print("|---|---|---|---|")
    with served() as here, served() as elsewhere:
        for via in WAYS:
            times = _measured(via, here, elsewhere, arguments)
            cells = [f"{_ms(times['alone'], 50)}, {_ms(times['alone'], 99)}"]
            cells += [f"{_ms(times[w], 50)}, {_ms(times[w], 99)}, {_ms(times[w], 100)}" for w in ("same", "other")]
            print(f"| {via} | " + " | ".join(cells) + " |", flush=True)


def _measured(via: Via, here: str, elsewhere: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The small step's times, slice by slice, in turn with a large one nowhere, here and elsewhere."""
    times: dict[str, list[float]] = {"alone": [], "same": [], "other": []}
    embeddings, labels = torch.randn(64, 128, requires_grad=True), torch.arange(64) // 4
    with (
        gradbank.connect(here, via=via) as client,
        _large(here, arguments.batch, arguments.bank) as same,
        _large(elsewhere, arguments.batch, arguments.bank) as other,
    ):
        loss_fn = client.open(f"small-{via}", losses.NTXentLoss())
        for _ in range(arguments.slices):
            for where, trains in (("alone", None), ("same", same), ("other", other)):
                if trains is not None:
                    trains.set()
                    time.sleep(_SLICE_S / 4)  # until its first step is under way
                until = time.perf_counter() + _SLICE_S
                while (begun := time.perf_counter()) < until:
                    embeddings.grad = None
                    loss_fn(embeddings, labels).backward()
                    times[where].append(time.perf_counter() - begun)
                if trains is not None:
                    trains.clear()
                    time.sleep(_SLICE_S)  # until its last one is over
    return times


@contextmanager
def _large(address: str, batch: int, bank: int) -> Iterator[Any]:
    """A process that trains in large steps while the event is set."""
    context = multiprocessing.get_context("spawn")
    trains, ready, over = context.Event(), context.Event(), context.Event()
    process = context.Process(target=_train, args=(address, batch, bank, trains, ready, over), daemon=True)
    process.start()
    try:
        if not ready.wait(120):
            raise RuntimeError("the trainer of large steps did not start")
        yield trains
    finally:
        over.set()
        trains.set()
        process.join(30)


def _train(address: str, batch: int, bank: int, trains: Any, ready: Any, over: Any) -> None:
    embeddings, labels = torch.randn(batch, 128, requires_grad=True), torch.randint(1000, (batch,))
    with gradbank.connect(address, timeout=120, via="tcp") as client:
        loss = losses.CrossBatchMemory(losses.NTXentLoss(), 128, bank)
        loss.add_to_memory(torch.randn(bank, 128), torch.randint(1000, (bank,)))
        loss_fn = client.open("large", loss)
        loss_fn(embeddings, labels)
        ready.set()
        while trains.wait() and not over.is_set():
            loss_fn(embeddings, labels).backward()
        client.close_session("large")


def _ms(times: list[float], percent: int) -> str:
    ordered = sorted(times)
    value = statistics.median(times) if percent == 50 else ordered[min(len(times) * percent // 100, len(times) - 1)]
    return f"{1e3 * value:.1f} ms"


if __name__ == "__main__":
    main()
