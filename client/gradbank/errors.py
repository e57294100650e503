"""The errors of gradbank; one that a server raises is raised again, as the same class, by the client.

GradbankError
  + InvalidRequest       INVALID_ARGUMENT     also a ValueError
  |   - InvalidComponent                      a component, or an argument of one, that does not exist or fit
  |   - NonFiniteError                        NaN or infinity, in a batch or in what came of it
  |   - InvalidUpdate                         an update of learnable weights that cannot be; it is not tried again
  + SessionNotFound      NOT_FOUND            also a LookupError
  + SessionConflict      ALREADY_EXISTS       the name is taken by a session that differs
  + Fenced               ABORTED              another trainer took over this rank of the session
  + StepConflict         FAILED_PRECONDITION  a step out of order, or another batch under the same number
  + LimitExceeded        RESOURCE_EXHAUSTED   more than the server may hold
  + ServerUnavailable    UNAVAILABLE          also a ConnectionError
  + DeadlineExceeded     DEADLINE_EXCEEDED    also a TimeoutError
  + ForkedClient         FAILED_PRECONDITION  a connection used in a forked child; never leaves the client
  + InternalError        INTERNAL             a fault of the server, logged there under the id in the message
"""

from typing import ClassVar

__all__ = [
    "DeadlineExceeded",
    "Fenced",
    "ForkedClient",
    "GradbankError",
    "InternalError",
    "InvalidComponent",
    "InvalidRequest",
    "InvalidUpdate",
    "LimitExceeded",
    "NonFiniteError",
    "ServerUnavailable",
    "SessionConflict",
    "SessionNotFound",
    "StepConflict",
    "error_classes",
]


class GradbankError(Exception):
    """Any failure of gradbank.

    Attributes:
        code: the name of the gRPC status that carries it.
    """

    code: ClassVar[str] = "INTERNAL"

    def __str__(self) -> str:  # KeyError's own would quote the message
        return str(self.args[0]) if self.args else ""

    def anew(self) -> "GradbankError":
        """The same, to be raised where it is kept: one that was raised holds what its frames do, batches among it."""
        return type(self)(*self.args)


class InvalidRequest(GradbankError, ValueError):
    """The request cannot be carried out; sending it again will not help. Nothing was changed."""

    code = "INVALID_ARGUMENT"


class InvalidComponent(InvalidRequest):
    """A loss, miner, distance or reducer that is not known, or an argument that it does not take."""


class NonFiniteError(InvalidRequest):
    """NaN or infinity in a batch, or in the loss or gradient it gave. Nothing was changed."""


class InvalidUpdate(InvalidRequest):
    """An update of the learnable weights cannot be carried out; it was dropped, and the weights are as they were."""


class SessionNotFound(GradbankError, LookupError):
    """No session has that name: it was never created here, was closed, or the server was restarted."""

    code = "NOT_FOUND"


class SessionConflict(GradbankError):
    """A session of that name exists and was created from another loss."""

    code = "ALREADY_EXISTS"


class Fenced(GradbankError):
    """A newer trainer attached to the same rank of the session; this one may not go on."""

    code = "ABORTED"


class StepConflict(GradbankError):
    """A step out of order, or a step number that was used for another batch."""

    code = "FAILED_PRECONDITION"


class LimitExceeded(GradbankError):
    """What was asked for is more than the server may hold."""

    code = "RESOURCE_EXHAUSTED"


class ServerUnavailable(GradbankError, ConnectionError):
    """The server cannot be reached, or went away."""

    code = "UNAVAILABLE"


class DeadlineExceeded(GradbankError, TimeoutError):
    """The server did not answer in time. A step may or may not have been carried out: retrying is safe."""

    code = "DEADLINE_EXCEEDED"


class ForkedClient(GradbankError, RuntimeError):
    """A connection was used in a forked child process, where gRPC would hang."""

    code = "FAILED_PRECONDITION"


class InternalError(GradbankError, RuntimeError):
    """The server failed in a way that it should not have."""


def error_classes() -> dict[str, type[GradbankError]]:
    """Every class of the tree, by name: the names are what crosses the wire."""
    found: dict[str, type[GradbankError]] = {}
    waiting: list[type[GradbankError]] = [GradbankError]
    while waiting:
        error = waiting.pop()
        found[error.__name__] = error
        waiting.extend(error.__subclasses__())
    return found
