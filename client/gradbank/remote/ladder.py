"""Ways to a server, and which of them a client takes: the fastest that the server offers to its process."""

import stat
import time
import weakref
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

from gradbank.errors import DeadlineExceeded, GradbankError, InvalidRequest, LimitExceeded, ServerUnavailable
from gradbank.remote.channel import GrpcTransport
from gradbank.remote.shared import SharedSteps
from gradbank.remote.transport import Steps, Transport, left_until
from gradbank.v1 import stats_pb2

Via = Literal["auto", "shm", "unix", "tcp"]
_LAST_PORT = 65535


def transport_to(address: str, timeout: float, via: Via) -> Transport:
    """The way to the server at an address; see `gradbank.connect`.

    Raises:
        InvalidRequest: an address of no known form, or a way that the server does not offer to this process.
        ServerUnavailable: no server listens there.
        DeadlineExceeded: it does not answer in time.
    """
    if via not in ("auto", "shm", "unix", "tcp"):
        raise InvalidRequest(f"via must be auto, shm, unix or tcp, got {via!r}")
    if not isinstance(address, str):
        raise InvalidRequest(f"an address is host:port, unix:///path or local://, got {address!r}")
    first, deadline = _at(address), time.monotonic() + timeout
    try:
        told: stats_pb2.GetServerResponse = first.call("GetServer", stats_pb2.GetServerRequest(), timeout)
        if not isinstance(first, GrpcTransport):
            if via != "auto":
                raise InvalidRequest(f"a server at {address} is inside this process: leave via={via!r} out")
            return first
        if first.via == via:
            return first
        if via == "tcp":
            raise InvalidRequest(f"{address} is a socket of this machine: for via='tcp', connect to host:port")
        return _climbed(first, told, deadline, via)
    except BaseException:
        first.close()
        raise


def _climbed(first: GrpcTransport, told: stats_pb2.GetServerResponse, deadline: float, via: Via) -> Transport:
    """The way that is wanted, in place of the first one."""
    if via != "unix" and told.shared_memory_socket:
        try:
            SharedSteps(told.shared_memory_socket, told.boot_id, left_until(deadline)).close()
        except GradbankError as error:
            if via == "shm" and isinstance(error, LimitExceeded | DeadlineExceeded):
                raise  # it is offered, and another time there may be room
            if via == "shm":
                raise InvalidRequest(
                    f"{first.address} offers shared memory, but not to this process: {error}"
                ) from None
        else:
            first.close()
            return SharedTransport(first.address, insists=via == "shm")
    if via != "shm" and first.via == "tcp" and told.unix_socket:
        nearer = GrpcTransport(f"unix://{told.unix_socket}")
        if _is_socket(told.unix_socket) and _is_at(nearer, told.boot_id, left_until(deadline)):
            first.close()
            return nearer
        nearer.close()
    if via == "auto":
        return first
    flag = {"shm": "--shared-memory", "unix": "--unix-socket"}[via]
    raise InvalidRequest(
        f"{first.address} offers via={via!r} not to this process: start the server with {flag}, on this machine and as "
        "this user, or leave via out"
    )


class SharedTransport(GrpcTransport):
    """gRPC, for all but steps: these go through shared memory, for as long as the server offers that.

    Args:
        insists: whether not to go any other way should it offer that no more.
    """

    def __init__(self, address: str, insists: bool) -> None:
        super().__init__(address)
        self._insists, self._otherwise = insists, self.via
        self._full = False
        self._made: weakref.WeakSet[SharedSteps] = weakref.WeakSet()
        self.via = "shm"

    def steps(self, timeout: float) -> Steps:
        if self._full:
            return super().steps(timeout)
        deadline = time.monotonic() + timeout
        told = self.call("GetServer", stats_pb2.GetServerRequest(), timeout)
        try:
            if not told.shared_memory_socket:
                raise ServerUnavailable(f"the server at {self.address} shares no memory any more")
            made = SharedSteps(
                *(told.shared_memory_socket, told.boot_id, left_until(deadline)),
                full=None if self._insists else self._go_otherwise,
            )
        except ServerUnavailable:
            if self._insists:
                raise
            self.via = self._otherwise
            return super().steps(timeout)
        self.via = "shm"
        self._made.add(made)
        return made

    def close(self) -> None:
        for made in list(self._made):  # which no channel takes along
            made.end()
        super().close()

    def _go_otherwise(self) -> None:
        """What does not fit the memory that the server shares goes the other way, from now on."""
        self._full, self.via = True, self._otherwise


def _at(address: str) -> Transport:
    scheme, separator, rest = address.partition("://")
    if scheme == "unix" and rest.startswith("/"):
        return GrpcTransport(address)
    if separator:
        found = entry_points(group="gradbank.transports", name=scheme)
        if not found:
            install = "install it with: pip install 'gradbank[server]'"
            rather = install if scheme == "local" else "use host:port, unix:///path or local://"
            raise InvalidRequest(f"{address!r} needs a transport that is not installed; {rather}")
        try:
            transport = next(iter(found)).load()
        except ModuleNotFoundError as error:  # the server's packages are an extra
            raise InvalidRequest(
                f"{address!r} needs {error.name}, which is not installed: pip install 'gradbank[server]'"
            ) from None
        made: Transport = transport(rest)
        return made
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise InvalidRequest(f"an address is host:port, unix:///path or local://, got {address!r}")
    if not 0 < int(port) <= _LAST_PORT:  # which gRPC would take for another
        raise InvalidRequest(f"a port is a number from 1 to {_LAST_PORT}, got {address!r}")
    return GrpcTransport(address)


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(Path(path).stat().st_mode)
    except OSError:  # of another machine, or not for this user
        return False


def _is_at(transport: GrpcTransport, boot_id: str, timeout: float) -> bool:
    """Whether that server, and no other, answers."""
    try:
        told = transport.call("GetServer", stats_pb2.GetServerRequest(), timeout)
    except GradbankError:
        return False
    return bool(told.boot_id == boot_id)
