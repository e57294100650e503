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
from floors import Floor

ROUNDS = 3  # at least, of a step and what is beside it


@dataclass(frozen=True)
class Limits:
    """What a measurement may take.

    Attributes:
        rounds: for how many seconds rounds of it are run.
        process: after how many seconds it is ended.
        memory: how many bytes a step may allocate at once.
    """

    rounds: float
    process: float
    memory: int
    threads: int


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
        asked = re.search(r"allocate (\d+) bytes", str(error))
        words = f"out of memory, asks for {int(asked[1]) / 2**30:,.1f} GiB" if asked else str(error)
        pipe.send(words.split("\n")[0][:80])


def _measure(case: Case, library: str, limits: Limits) -> Measured:
    torch.set_num_threads(limits.threads)
    torch.manual_seed(0)
    Floor(256, 4096, case.dimension, both=True).best()()
    steps.make(steps.smaller(case), library)()
    step = steps.make(case, library)
    scale, beside = 1.0, None
    if isinstance(case.beside, Case):
        scale, beside = case.bank / case.beside.bank, steps.make(case.beside, library)
    for leaf in step.leaves:
        leaf.grad = torch.ones_like(leaf)  # zeros would not be in memory yet
    before = _start_of_peak()
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + limits.memory,) * 2)
    first = _seconds(step)
    extra = max(0, _status("VmHWM") - before)
    gradient = step.leaves[0].grad.numpy(force=True).copy() if step.leaves else None
    if isinstance(case.beside, Floor):
        beside = case.beside.best()
    seconds, others = _rounds(step, beside, limits.rounds, first)
    ratio = seconds / others / scale if others else None
    return Measured(seconds, ratio, extra / 2**20, gradient)


def _rounds(
    step: Callable[[], None], beside: Callable[[], None] | None, seconds: float, first: float
) -> tuple[float, float]:
    """The median times of a step and of what is beside it, by turns. What takes ten times the seconds runs once."""
    begun, times, others = time.perf_counter(), [], []
    if first > 10 * seconds:
        return first, _seconds(beside) if beside else 0.0
    while True:
        others.append(_seconds(beside) if beside else 0.0)
        times.append(_seconds(step))
        elapsed = time.perf_counter() - begun
        if elapsed > 10 * seconds or (elapsed > seconds and len(times) >= ROUNDS):
            return statistics.median(times), statistics.median(others)


def _seconds(step: Callable[[], None]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def _start_of_peak() -> int:
    """Resets the mark of peak memory, and says what is held: only what is in use, without what was freed before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
