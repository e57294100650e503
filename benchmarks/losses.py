"""Time and peak memory of every loss and miner, beside the floor and against the targets; prints Markdown tables.

    python benchmarks/losses.py                                  # all of it
    python benchmarks/losses.py --section bank --only Triplet
    python benchmarks/losses.py --pml                            # and pytorch-metric-learning, beside

Each measurement is a process of its own, in which the step (the loss and its gradient, in float32) and what it is
compared with take turns: the floor (see `floors.py`), or for the large bank the same step on the smaller one, row for
row. Memory is what the step adds (see `measure.py`), of the process, for which this needs Linux, or of the GPU.
"""

import argparse
import re
import sys
from importlib.metadata import version

import numpy as np
import torch
from cases import SECTIONS, SMALL, Case, Sizes, title
from floors import Floor
from measure import Limits, Measured, measured

HEADER = ("case", "time", "target", "extra memory", "target", "")
OF_PML = ("PML", "extra memory", "gradients differ by")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=SECTIONS, help="this one only")
    parser.add_argument("--only", metavar="REGEX", default="", help="cases whose name has it")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each case runs, three times at least")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="where it is computed, as in --device cuda")
    parser.add_argument("--pml", action="store_true", help="pytorch-metric-learning too")
    parser.add_argument("--gib", type=float, default=16.0, help="what a step may allocate, of either library")
    parser.add_argument("--pml-seconds", type=float, default=60.0, help="after which PML is stopped")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--list", action="store_true", help="the cases and their targets, without measuring")
    parser.add_argument("--small", action="store_true", help="tiny sizes, which say nothing but that this runs")
    arguments = parser.parse_args()
    sizes, memory = SMALL if arguments.small else Sizes(), int(arguments.gib * 2**30)
    of_ours = Limits(arguments.seconds, 1800, memory, arguments.threads, arguments.device)
    of_pml = Limits(arguments.seconds, arguments.pml_seconds, memory, arguments.threads, arguments.device)
    print(f"gradbank {version('gradbank')}, torch {torch.__version__}, {_device(arguments)}, float32")
    missed = 0
    for section in [arguments.section] if arguments.section else SECTIONS:
        chosen = [case for case in SECTIONS[section](sizes) if re.search(arguments.only, case.name)]
        if not chosen:
            continue
        header = HEADER + (OF_PML if arguments.pml else ())
        print(f"\n### {title(section, sizes)}\n\n{row(*header)}\n|{'---|' * len(header)}", flush=True)
        for case in chosen:
            ours = None if arguments.list else measured(case, "gradbank", of_ours)
            cells = [case.name, *against_target(case, ours)]
            missed += cells[-1].startswith("missed")
            if arguments.pml:
                theirs = None if arguments.list else measured(case, "pytorch_metric_learning", of_pml)
                cells += [time_of(case, theirs), memory_of(theirs), difference(ours, theirs)]
            print(row(*cells), flush=True)
    sys.exit(1 if arguments.check and missed else 0)


def _device(arguments: argparse.Namespace) -> str:
    if arguments.device == "cpu":
        return f"{arguments.threads} threads"
    return torch.cuda.get_device_name(arguments.device)


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def against_target(case: Case, result: Measured | str | None) -> tuple[str, str, str, str, str]:
    """Time, its target, memory, its target, and what is missed."""
    target, missed = case.target, []
    if isinstance(result, Measured):
        time, ratio = result.seconds, result.ratio
        if (target.ratio and ratio and ratio > target.ratio) or (target.seconds and time > target.seconds):
            missed.append("time")
        if target.mib and result.mib > target.mib:
            missed.append("memory")
    of_time = f"<= {target.ratio:g}x" if target.ratio else f"<= {target.seconds:g} s" if target.seconds else "completes"
    of_memory = f"<= {target.mib:g} MiB" if target.mib else "-"
    verdict = "" if result is None else "missed" if isinstance(result, str) else "ok"
    return (
        time_of(case, result),
        of_time,
        memory_of(result),
        of_memory,
        f"missed: {', '.join(missed)}" if missed else verdict,
    )


def time_of(case: Case, result: Measured | str | None) -> str:
    if not isinstance(result, Measured):
        return result or ""
    if result.ratio is None:
        return f"{result.seconds:.2f} s" if result.seconds >= 0.1 else f"{1e3 * result.seconds:.2f} ms"
    return f"{result.ratio:.2f}x {'floor' if isinstance(case.beside, Floor) else 'per row'}"


def memory_of(result: Measured | str | None) -> str:
    return "" if result is None else f"{result.mib:.0f} MiB" if isinstance(result, Measured) else "-"


def difference(ours: Measured | str | None, theirs: Measured | str | None) -> str:
    """The norm of the difference of the gradients of the embeddings, over that of PML's."""
    if not isinstance(ours, Measured) or not isinstance(theirs, Measured) or theirs.gradient is None:
        return "-" if ours else ""
    return f"{np.linalg.norm(ours.gradient - theirs.gradient) / max(np.linalg.norm(theirs.gradient), 1e-30):.0e}"


if __name__ == "__main__":
    main()
