"""A batch of 256 against a memory bank of 65,536 x 128: time and peak memory of gradbank and PML, side by side.

    python benchmarks/bank.py [--rows 65536] [--losses NTXentLoss ...] [--seconds 4]

Each measurement is a process of its own: the bank is filled, the kernel's mark of peak memory is reset, then steps
(loss and backward) run. Times are given as ratios to the floor, measured beside them: one product of the batch with
the bank, one exponential of each entry, one product back. PML may use 16 GiB; "asks for" is what it wanted beyond.
"""

import argparse
import gc
import multiprocessing
import re
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

DIMENSION, BATCH, CLASSES, CAP = 128, 256, 1000, 16 * 2**30
LOSSES = (
    "NTXentLoss",
    "SupConLoss",
    "MultiSimilarityLoss",
    "TupletMarginLoss",
    "CircleLoss",
    "NCALoss",
    "IntraPairVarianceLoss",
    "LiftedStructureLoss",
    "GeneralizedLiftedStructureLoss",
    "ContrastiveLoss",
    "SignalToNoiseRatioContrastiveLoss",
    "MarginLoss",
    "TripletMarginLoss",
)


def points(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Embeddings around class centres: cosine about 0.2 within a class, about 0 across."""
    centres = torch.randn(CLASSES, DIMENSION, generator=torch.Generator().manual_seed(0))
    return 0.5 * centres[labels] + torch.randn(len(labels), DIMENSION, generator=torch.Generator().manual_seed(seed))


def stepper(library: str, loss: str, rows: int) -> Callable[[], object]:
    """One step of a loss in a bank that is full."""
    generator = torch.Generator().manual_seed(1)
    memory_labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    memory, batch = points(memory_labels, 2), points(labels, 3).requires_grad_()
    if library == "floor":
        return lambda: floor(batch.detach(), memory)
    if library == "gradbank":
        from gradbank import losses
    else:
        from pytorch_metric_learning import losses  # type: ignore[no-redef]
    bank = losses.CrossBatchMemory(getattr(losses, loss)(), DIMENSION, memory_size=rows)
    for start in range(0, rows, BATCH):
        part = slice(start, start + BATCH)
        bank.add_to_memory(memory[part], memory_labels[part], len(memory[part]))
    return lambda: bank(batch, labels).backward()


def floor(batch: torch.Tensor, memory: torch.Tensor, width: int = 1024) -> torch.Tensor:
    """What no loss of this kind can do without, in tiles that fit the cache."""
    gradient, tile = torch.zeros_like(batch), torch.empty(len(batch) * width)
    for start in range(0, len(memory), width):
        part = memory[start : start + width]
        s = tile[: len(batch) * len(part)].view(len(batch), len(part))
        torch.mm(batch, part.T, out=s)
        gradient.addmm_(s.exp_(), part)
    return gradient


def measure(pipe: Connection, library: str, loss: str, rows: int, seconds: float) -> None:
    """In a child: sends (median seconds of a step, peak bytes above the start), or what went wrong."""
    step = stepper(library, loss, rows)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")
    before = status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + CAP,) * 2)
    try:
        step()
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
    except RuntimeError as error:
        asked = re.search(r"allocate (\d+) bytes", str(error))
        pipe.send(f"out of memory, asks for {int(asked[1]) / 2**30:,.0f} GiB at once" if asked else str(error)[:60])
        return
    pipe.send((statistics.median(times), status("VmHWM") - before))


def status(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def in_child(*case: object) -> tuple[float, int] | str:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=measure, args=(theirs, *case))
    child.start()
    theirs.close()
    try:
        result: tuple[float, int] | str = ours.recv()
    except EOFError:
        result = "the process was ended"
    child.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65536)
    parser.add_argument("--losses", nargs="+", default=LOSSES)
    parser.add_argument("--seconds", type=float, default=4.0)
    arguments = parser.parse_args()
    print(f"batch {BATCH}, bank {arguments.rows:,} x {DIMENSION}, {CLASSES} classes, {torch.get_num_threads()} threads")
    print("| loss | gradbank | extra memory | PML | extra memory |\n|---|---|---|---|---|")
    for loss in arguments.losses:
        least = in_child("floor", loss, arguments.rows, arguments.seconds)
        cells = []
        for library in ("gradbank", "pml"):
            result = in_child(library, loss, arguments.rows, arguments.seconds)
            if isinstance(result, str) or isinstance(least, str):
                cells += [str(result), "-"]
            else:
                cells += [f"{result[0] / least[0]:.1f} x floor", f"{result[1] / 2**20:.0f} MiB"]
        print(f"| {loss} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
