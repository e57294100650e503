"""How the server logs: for people on a terminal, one JSON object a line otherwise."""

import logging
import sys
from typing import Any

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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
