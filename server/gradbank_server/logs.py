"""How the server logs: for people on a terminal, one JSON object a line otherwise."""

import logging
import sys
from contextlib import suppress
from typing import Any, TextIO

import structlog


def configure(form: str, level: str) -> None:
    """Sends log lines to standard error.

    Args:
        form: "console", "json", or "auto", which is console on a terminal.
        level: the least that is logged.
    """
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    last: list[Any] = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    if not console:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(_Lenient(sys.stderr)),  # type: ignore[arg-type]  # print needs no more
    )


class _Lenient:
    """A stream of which it does not matter whether it can be written to: what is logged has happened."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a full disk, a reader that is gone, a closed stream
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()
