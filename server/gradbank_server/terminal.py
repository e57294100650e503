"""Where commands print, and how they say what is wrong."""

import errno
import os
import sys

from cyclopts import CycloptsError
from pydantic import ValidationError
from rich.console import Console
from rich.table import Column, Table


class _Console(Console):
    """One that leaves it to the command what it means that nobody reads on."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


# off a terminal, a line is as long as it needs to be: somebody's grep is reading
console = _Console() if sys.stdout and sys.stdout.isatty() else _Console(width=200)
_WIDEST = 10_000


def table_of(*headings: str) -> Table:
    """A table that breaks what finds no room, rather than cut it off: names are copied from it."""
    return Table(*(Column(heading, overflow="fold") for heading in headings), box=None)


def show(table: Table) -> None:
    """Prints a table; off a terminal a row is a line."""
    if not console.is_terminal:
        wide = console.options.update(max_width=_WIDEST)
        console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)


def refused(error: ValidationError) -> str:
    """What is wrong with settings, by flag and variable."""
    where = {str(each["loc"][0]): (each["msg"], each["input"]) for each in error.errors()}
    return "; ".join(
        f"--{name.replace('_', '-')} (GRADBANK_{name.upper()}): {said}, got {given!r}"
        for name, (said, given) in where.items()
    )


def told(error: CycloptsError) -> str:
    """What is wrong with a command's words, or with the settings that they and the environment make."""
    cause = error.__cause__
    return refused(cause) if isinstance(cause, ValidationError) else str(error)


def failed(error: object) -> int:
    """Says what is wrong; the exit code for that."""
    Console(stderr=True).print(f"gradbank: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
    return 2
