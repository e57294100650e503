"""What the commands print: tables and lines, made of what they found out."""

import statistics
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:  # of what imports torch, which not every command needs
    from gradbank.remote.stats import ComponentInfo
    from gradbank_server.bench import Course
    from gradbank_server.service import Server

Arguments = Sequence[tuple[str, str, str | None]]  # name, type, and default, which is None if the argument is required


def started(server: "Server") -> str:
    """What was started, and what to paste."""
    from gradbank_server.service.server import bracketed

    settings, host = server.settings, bracketed(server.settings.host)
    metrics = "off" if server.metrics_port is None else f"http://{host}:{server.metrics_port}/metrics"
    lines = [
        f"gradbank {version('gradbank')}",
        f"  listening   {host}:{server.port} (gRPC, no TLS, no authentication)",
        *([f"              unix://{settings.unix_socket} (this user only)"] if settings.unix_socket else []),
        *(["              shared memory (this user's processes only)"] if settings.shared_memory else []),
        f"  device      {server.service.device}",
        f"  metrics     {metrics}",
        f"  limits      {settings.max_sessions} sessions, {_size(settings.max_session_bytes)} each, "
        f"{_size(settings.max_step_bytes)} a step",
        f'  client      loss_fn = gradbank.connect("{server.address}").open("my-run", loss_fn)',
    ]
    return "\n".join(lines)


def times(course: "Course") -> Table:
    """Where the time of a step went, beside a call that carries nothing and the same loss here."""
    from gradbank_server.bench import PHASES

    table = Table("phase", "where", "p50 ms", "p99 ms", "share", "", box=None)
    for phase, (where, what) in PHASES.items():
        spent = course.phases[phase]
        share = f"{100 * statistics.median(spent) / course.step_s:.0f} %"
        table.add_row(phase, where, *_milliseconds(spent), share, what)
    table.add_row("step", "", *_milliseconds(course.steps), "", f"{1 / course.step_s:,.0f} a second")
    table.add_section()
    least = f"the least a step takes here: the step's is {course.step_s / statistics.median(course.empty):.1f} times it"
    table.add_row("empty call", "between", *_milliseconds(course.empty), "", least)
    table.add_row("local", "here", *_milliseconds(course.here), "", "the same loss in this process")
    return table


def listed(kind: str, infos: "list[ComponentInfo]") -> tuple[Table, str]:
    """A table of the components of a kind, and a line that names the arguments that all of them take, if any."""
    common = [each for each in infos[0].arguments if all(each in info.arguments for info in infos)]
    table = Table("kind", "name", "arguments", box=None)
    for info in infos:
        own = [each for each in info.arguments if len(infos) == 1 or each not in common]
        table.add_row(kind, info.name, _arguments(own))
    return table, f"every {kind} takes {_arguments(common)}" if common and len(infos) > 1 else ""


def described(info: "ComponentInfo") -> str:
    """A component: how it is called, what it is, the types of its arguments and its paper."""
    parts = [f"{info.kind} {info.name}({_arguments(info.arguments)})", info.documentation]
    width = max((len(argument) for argument, _, _ in info.arguments), default=0)
    types = [f"    {argument:{width}}  {type_}" for argument, type_, _ in info.arguments]
    parts += ["\n".join(["Types:", *types])] * bool(types) + [f"Paper:\n    {line}" for line in info.paper.splitlines()]
    return "\n\n".join(part for part in parts if part)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, in words: "0-3,7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def duration(seconds: float) -> str:
    """How long, in the unit that fits."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _arguments(arguments: Arguments) -> str:
    return ", ".join(name if default is None else f"{name}={default}" for name, _, default in arguments)


def _milliseconds(spent: Sequence[float]) -> tuple[str, str]:
    """The median and the 99th of a hundred."""
    return f"{1e3 * statistics.median(spent):.2f}", f"{1e3 * sorted(spent)[len(spent) * 99 // 100]:.2f}"


def _size(count: int) -> str:
    return f"{count / 2**30:g} GiB" if count >= 2**30 else f"{count / 2**20:g} MiB"
