"""Steps of real losses through a server, beside the same loss in this process and pytorch-metric-learning's.

    python benchmarks/hosted.py
    python benchmarks/hosted.py --banks 8192 --only NTXent

A step is the loss of a batch against a full bank, and its gradient; batches follow one another. Server and trainer
share this machine, and torch's threads sleep between steps in both (GOMP_SPINCOUNT, unless the environment has it); for
each loss the contenders take turns in one process, and a figure is a median. `allowed` is what a step over TCP may
take: the local step and 1.1 times the round trip of an echo of the same batch.
"""

import argparse
import itertools
import multiprocessing
import os
import re
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection

import steps
import torch
from cases import SECTIONS, Case, Sizes
from floors import seconds as seconds_of
from transport.echo import EchoLoss
from transport.served import served

import gradbank

_LOCAL, _TCP, _SHARED, _PML, _ECHO = "local", "over TCP", "shared memory", "PML", "echo"

Batches = list[tuple[torch.Tensor, torch.Tensor]]  # labels and embeddings
Times = dict[str, float | str]  # medians in seconds, or why there is none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--banks", default="8192,65536", help="rows, comma-separated")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose name has it")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long each case is measured")
    parser.add_argument("--gib", type=float, default=16.0, help="what a step may allocate, on a CPU")
    parser.add_argument("--device", default="cpu", help="of the trainer; the server has a GPU if there is one")
    arguments = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # for the processes to come
    print(f"gradbank {gradbank.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    with served() as address:
        for rows in map(int, arguments.banks.split(",")):
            print(f"\n### A bank of {rows:,} x 128, a batch of {arguments.batch}, {min(1000, rows // 8):,} classes\n")
            print("| case | local | over TCP | allowed | shared memory | PML here | TCP over PML |\n|---|" + 6 * "---|")
            sizes = Sizes(batch=arguments.batch, bank=rows, labels=min(1000, rows // 8))
            for case in SECTIONS["bank"](sizes):
                if re.search(arguments.only, case.name):
                    print(_line(case.name, _apart(case, address, arguments)), flush=True)


def _apart(case: Case, address: str, arguments: argparse.Namespace) -> Times:
    """The times of a case, measured in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, case, address, arguments))
    child.start()
    theirs.close()
    times: Times = ours.recv()
    child.join()
    return times


def _child(pipe: Connection, case: Case, address: str, arguments: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    device, seconds = arguments.device, arguments.seconds
    if device == "cpu":  # a GPU's driver reserves more addresses than there is memory
        resource.setrlimit(resource.RLIMIT_AS, (int(arguments.gib * 2**30),) * 2)
    local = steps.make(replace(case, beside=None), "gradbank", device)
    assert isinstance(local.loss, gradbank.losses.Loss)
    # of one alone, the bank would soon be full, and every row a positive
    batches = list(steps.batches(case, 16, device))
    with (
        gradbank.connect(address, 120, via="tcp") as far,
        gradbank.connect(address, 120, via="shm") as near,
    ):
        runs: dict[str, Callable[[], None]] = {_LOCAL: partial(_step, local.loss, itertools.cycle(batches))}
        for name, client, loss in ((_TCP, far, local.loss), (_SHARED, near, local.loss), (_ECHO, far, EchoLoss())):
            hosted = client.open(f"{case.name.replace(' ', '-').replace(',', '')}-{case.bank}-{name[:4]}", loss)
            runs[name] = partial(_step, hosted, itertools.cycle(batches))
        times: Times = {}
        measured = {name: [] for name in runs}  # type: dict[str, list[float]]
        for run in runs.values():
            run()
        begun = time.perf_counter()
        while len(measured[_ECHO]) < 5 or time.perf_counter() - begun < seconds:
            for name, run in runs.items():
                measured[name].append(seconds_of(run))
        times |= {name: statistics.median(each) for name, each in measured.items()}
        for client in (far, near):
            for session in client.sessions():
                client.close_session(session.name)
    times[_PML] = _of_pml(case, batches, arguments)
    pipe.send(times)


def _step(loss_fn: torch.nn.Module, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
    labels, embeddings = next(batches)
    embeddings.grad = None
    for weight in loss_fn.parameters():
        weight.grad = None
    loss_fn(embeddings, labels).backward()


def _of_pml(case: Case, batches: Batches, arguments: argparse.Namespace) -> float | str:
    """The median of PML's step, of the same batches in turn, or what became of it."""
    try:
        loss = steps.make(case, "pytorch_metric_learning", arguments.device).loss
        assert loss is not None  # it has a bank
        step = partial(_step, loss, itertools.cycle(batches))
        first = seconds_of(step)
        if first > arguments.seconds:
            return first
        return statistics.median(seconds_of(step) for _ in range(max(3, int(arguments.seconds / first))))
    except (RuntimeError, MemoryError) as error:
        asked = re.search(r"allocate (\d+) bytes", str(error))
        return f"asks for {int(asked[1]) / 2**30:,.1f} GiB" if asked and int(asked[1]) > 2**30 else "out of memory"
    except NotImplementedError:
        return "has none"


def _line(name: str, times: Times) -> str:
    def cell(what: float | str) -> str:
        return what if isinstance(what, str) else f"{1e3 * what:.1f} ms"

    local, remote, echo, pml = (times[each] for each in (_LOCAL, _TCP, _ECHO, _PML))
    assert not isinstance(local, str)
    assert not isinstance(remote, str)
    assert not isinstance(echo, str)
    ratio = "-" if isinstance(pml, str) else f"{remote / pml:.2f}x"
    cells = [name, cell(local), cell(remote), cell(local + 1.1 * echo), cell(times[_SHARED]), cell(pml), ratio]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
