"""What a trainer is told of a fault of the server's, or of a component that is not gradbank's."""

import traceback
import uuid
from collections.abc import Iterable

import structlog

from gradbank.errors import GradbankError, InternalError, LimitExceeded
from gradbank_server.sessions import is_out_of_memory

log = structlog.get_logger()


def told(error: Exception) -> GradbankError:
    """What is told of a call that failed in whatever way."""
    if is_out_of_memory(error):
        return LimitExceeded("the server has no memory for it; nothing was changed. Ask for less, or try again")
    return fault(error)


def fault(error: Exception, components: Iterable[str] = ()) -> InternalError:
    """An id, under which the log has the rest; of an error that a user's own component raised, that too.

    Args:
        components: the packages that are the users' own.
    """
    name = uuid.uuid4().hex[:12]
    log.error("fault", id=name, exc_info=error)
    where = raised_by(error, components)
    if where is None:
        return InternalError(f"the server failed, and its log has the details under {name}; asking again is safe")
    return InternalError(
        f"{where}, raised {type(error).__name__}: {error}. Asking again is safe, but the same batch may fail again; "
        f"the server's log has the details under {name}"
    )


def refusal(error: GradbankError, components: Iterable[str]) -> GradbankError:
    """What is refused, and by which line of a user's own component, if it is one that does."""
    cause = error.__cause__
    where = raised_by(cause, components) if isinstance(cause, Exception) else None
    return error if where is None else type(error)(f"{error} ({where})")


def raised_by(error: Exception, packages: Iterable[str]) -> str | None:
    """The innermost line of some packages that an error came through; None if it came through none."""
    prefixes = tuple(f"{package}." for package in packages)
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = str(frame.f_globals.get("__name__", ""))
        if f"{module}.".startswith(prefixes):
            return f"{module}, line {line}, in {frame.f_code.co_qualname}"
    return None
