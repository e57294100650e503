"""What a trainer is told of a fault of the server's."""

import uuid

import structlog

from gradbank.errors import InternalError

log = structlog.get_logger()


def fault(error: Exception) -> InternalError:
    """An id, under which the log has the rest."""
    name = uuid.uuid4().hex[:12]
    log.error("fault", id=name, exc_info=error)
    return InternalError(f"the server failed, and its log has the details under {name}; asking again is safe")
