"""What a trainer is told of a fault of the server's, or of a component that is not gradbank's."""

import traceback
import uuid
from collections.abc import Iterable

import structlog

from gradbank.errors import InternalError

log = structlog.get_logger()


def fault(error: Exception, components: Iterable[str] = ()) -> InternalError:
    """An id, under which the log has the rest; of an error that a user's own component raised, that too.

    Args:
        components: the packages that are the users' own.
    """
    name = uuid.uuid4().hex[:12]
    log.error("fault", id=name, exc_info=error)
    where = _raised_by(error, tuple(components))
    if where is None:
        return InternalError(f"the server failed, and its log has the details under {name}; asking again is safe")
    return InternalError(
        f"{where} raised {type(error).__name__}: {error}. Asking again is safe, but the same batch may fail again; the "
        f"server's log has the details under {name}"
    )


def _raised_by(error: Exception, packages: tuple[str, ...]) -> str | None:
    """The line of a package where an error came from, whatever of torch it called; None if it came from elsewhere."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] == "torch":
            continue
        if any(f"{module}.".startswith(f"{package}.") for package in packages):
            return f"{module}, line {line} ({frame.f_code.co_qualname}),"
        return None
    return None
