"""The errors of `gradbank.errors` to and from messages and gRPC statuses."""

from collections.abc import Iterable

import grpc

from gradbank.errors import (
    DeadlineExceeded,
    GradbankError,
    InternalError,
    LimitExceeded,
    ServerUnavailable,
    error_classes,
)
from gradbank.v1 import error_pb2 as v1

ERROR_TRAILER = "gradbank-error-bin"


_LONGEST = 1500  # characters, of which a peer may have chosen most; gRPC drops a call whose trailer is too long


def error_message(error: GradbankError) -> v1.Error:
    said = str(error)
    said = said if len(said) <= _LONGEST else f"{said[: _LONGEST // 2]} [...] {said[-_LONGEST // 2 :]}"
    return v1.Error(type=type(error).__name__, code=error.code, message=said)


def status_of(error: GradbankError) -> grpc.StatusCode:
    return grpc.StatusCode[error.code]


def error_of(failure: v1.Error | grpc.RpcError) -> GradbankError:
    """The error that the other side raised, made again on this side."""
    if isinstance(failure, v1.Error):
        return error_classes().get(failure.type, GradbankError)(failure.message)
    trailers: Iterable[tuple[str, str | bytes]] = failure.trailing_metadata() or ()  # type: ignore[assignment]
    for key, value in trailers:
        if key == ERROR_TRAILER and isinstance(value, bytes):
            return error_of(v1.Error.FromString(value))
    code, details = failure.code(), failure.details() or "no details"
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"the server did not answer in time ({details})")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return ServerUnavailable(f"the server cannot be reached: {details}")
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return LimitExceeded(
            f"the server refused the call: too many are under way, or a message is too large ({details})"
        )
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return InternalError(f"what answers there is no server of gradbank, or one of another version ({details})")
    return InternalError(f"the call failed with {code.name}: {details}")
