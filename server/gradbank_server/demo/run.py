"""The demo from start to finish: data, server, training, report."""

import dataclasses
import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import gradbank
from gradbank.datasets import glyphs
from gradbank.remote.stats import SessionStats
from gradbank_server.demo.hosted import hosted
from gradbank_server.demo.picture import draw
from gradbank_server.demo.recipe import Recipe
from gradbank_server.demo.training import Course, train

LEARNED = 0.3  # by how much R@1 must rise in a whole training
EXACT = 1e-6  # the largest difference of gradients that passes; both sides run the same code, so it should be 0


def run(steps: int | None, picture: Path, cache: Path | None) -> int:
    """Runs the demo; 0 if the network learned and the server's gradients were right, 1 if not."""
    console = Console(highlight=False)
    recipe = Recipe() if steps is None else dataclasses.replace(Recipe(), steps=steps)
    console.print("Glyphs: 2,069 characters in 12 typefaces, drawn from matplotlib's fonts ...")
    seen, unseen = glyphs(cache).split()
    with hosted() as address, gradbank.connect(address) as client:
        server = client.server()
        shape = f"{recipe.memory_size:,} x {recipe.embedding_size}"
        console.print(f"Server: {address} on {server.device}, a process of its own, holds the {shape} bank")
        begun = time.perf_counter()
        with _progress(console) as bar:
            task = bar.add_task("training", total=recipe.steps, loss="-", recall="-")

            def advance(course: Course) -> None:
                recall = f"{100 * course.recalls[-1][1]:.1f} %"
                loss = statistics.fmean(course.losses[-20:])
                bar.update(task, completed=len(course.losses), loss=f"{loss:.3f}", recall=recall)

            encoder, course = train(client, seen, unseen, recipe, advance)
        seconds = time.perf_counter() - begun
        stats = client.stats("glyphs")
    draw(picture, encoder, course, unseen)
    before, after = course.recalls[0][1], course.recalls[-1][1]
    learned = after - before > (LEARNED if steps is None else 0.0)
    exact = course.difference <= EXACT
    console.print(_report(course, before, after, stats, seconds))
    console.print(f"Picture: {picture}")
    if not learned:
        console.print(f"FAILED: R@1 rose from {before:.1%} to {after:.1%} only", style="red")
    if not exact:
        console.print(f"FAILED: a remote gradient is off by {course.difference:.1e}", style="red")
    if learned and exact:
        console.print("Next: gradbank serve | gradbank catalog | python examples/train.py")
    return 0 if learned and exact else 1


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  R@1 {task.fields[recall]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _report(course: Course, before: float, after: float, stats: SessionStats, seconds: float) -> Table:
    def ms(times: list[float]) -> str:
        return f"{1e3 * statistics.median(times):.1f} ms"

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_row("R@1, unseen classes", f"{before:.1%} before, {after:.1%} after {len(course.losses):,} steps")
    table.add_row("gradients", f"remote - local = {course.difference:.1e} at most, of {course.checked} steps compared")
    parts = f"model {ms(course.model_s)} + server {ms(course.server_s)} + network {ms(course.network_s)}"
    table.add_row("a step (median)", parts)
    table.add_row("bank", f"{stats.bank_rows:,} rows; {stats.steps:,} steps, {stats.replayed} sent twice")
    table.add_row("time", f"{seconds:.0f} s")
    return table
