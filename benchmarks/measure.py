"""One measurement, in a process of its own: time beside that of the floor, and peak memory.

Peak memory is the process's high-water mark during the first step, above what it held just before. That is taken when
the data, the filled bank, the weights and all gradients exist, and after a warm-up on little: the floor and the same
loss on a few rows. So it is the step's own, without the threads of torch, the buffers of the matrix library and the
code of autograd, which the first step of any kind brings into a process.
"""

import ctypes
import gc
import multiprocessing
import re
import resource
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import steps
import torch
from cases import Case
from floors import Floor, seconds

ROUNDS = 3  # at least, of a step and what is beside it


@dataclass(frozen=True)
class Limits:
    """What a measurement may take.

    Attributes:
        rounds: for how many seconds rounds of it are run.
        process: after how many seconds it is ended.
        memory: how many bytes a step may allocate at once.
        device: where it is computed.
    """

    rounds: float
    process: float
    memory: int
    threads: int
    device: str = "cpu"


@dataclass(frozen=True)
class Measured:
    """Medians of a step.

    Attributes:
        seconds: of the step.
        ratio: over the time of what is beside it, row for row where that has fewer; None if there is nothing.
        mib: peak memory above the start.
        gradient: with respect to the embeddings; None for a miner.
    """

    seconds: float
    ratio: float | None
    mib: float
    gradient: np.ndarray | None


def measured(case: Case, library: str, limits: Limits) -> Measured | str:
    """What a step of a case takes, or in words why that is not known."""
    context = multiprocessing.get_context("forkserver")  # forks what has imported torch, and never ran it
    context.set_forkserver_preload(["torch"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, case, library, limits))
    child.start()
    theirs.close()
    try:
        result = ours.recv() if ours.poll(limits.process) else f"over {limits.process:g} s"
    except EOFError:
        result = "the process was ended"
    child.kill()
    child.join()
    return result


def _child(pipe: Connection, case: Case, library: str, limits: Limits) -> None:
    warnings.simplefilter("ignore")
    try:
        pipe.send(_measure(case, library, limits))
    except MemoryError:
        pipe.send("out of memory")
    except RuntimeError as error:
        asked = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ GiB)", str(error))
        gib = asked and (asked[2] or f"{int(asked[1]) / 2**30:,.1f} GiB")
        words = f"out of memory, asks for {gib}" if asked else str(error)
        pipe.send(words.split("\n")[0][:80])


def _measure(case: Case, library: str, limits: Limits) -> Measured:
    torch.set_num_threads(limits.threads)
    torch.manual_seed(0)
    device = limits.device
    Floor(256, 4096, case.dimension, both=True).best(device)()
    steps.make(steps.smaller(case), library, device)()
    step = steps.make(case, library, device)
    scale, beside = 1.0, None
    if isinstance(case.beside, Case):
        scale, beside = case.bank / case.beside.bank, steps.make(case.beside, library, device)
    for leaf in step.leaves:
        leaf.grad = torch.ones_like(leaf)  # zeros would not be in memory yet
    peak = _peak_of_process(limits.memory) if device == "cpu" else _peak_of_gpu(limits.memory)
    first = seconds(step)
    extra = max(0, peak())
    gradient = step.leaves[0].grad.numpy(force=True).copy() if step.leaves else None
    if isinstance(case.beside, Floor):
        beside = case.beside.best(device)
    own, others = _rounds(step, beside, limits.rounds, first)
    ratio = own / others / scale if others else None
    return Measured(own, ratio, extra / 2**20, gradient)


def _rounds(
    step: Callable[[], None], beside: Callable[[], None] | None, least: float, first: float
) -> tuple[float, float]:
    """The median times of a step and of what is beside it, by turns. What takes ten times the seconds runs once."""
    begun, times, others = time.perf_counter(), [], []
    if first > 10 * least:
        return first, seconds(beside) if beside else 0.0
    while True:
        others.append(seconds(beside) if beside else 0.0)
        times.append(seconds(step))
        elapsed = time.perf_counter() - begun
        if elapsed > 10 * least or (elapsed > least and len(times) >= ROUNDS):
            return statistics.median(times), statistics.median(others)


def _peak_of_process(limit: int) -> Callable[[], int]:
    """Resets the mark of peak memory and limits what is allocated beyond what is in use; then tells by how much the
    mark has risen above that."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not in use
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")
    before = _status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + limit,) * 2)
    return lambda: _status("VmHWM") - before


def _peak_of_gpu(limit: int) -> Callable[[], int]:
    """The same of a GPU's memory."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + limit) / whole))
    return lambda: torch.cuda.max_memory_allocated() - before


def _status(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
