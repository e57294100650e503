"""A connection to a server, and the losses it hosts."""

import os
import secrets
import time
import weakref
from contextlib import suppress
from numbers import Integral
from typing import Any, TypeVar

import torch

from gradbank.arguments import argument_fields
from gradbank.component import Component
from gradbank.errors import (
    Fenced,
    ForkedClient,
    GradbankError,
    InvalidComponent,
    InvalidRequest,
    ServerUnavailable,
    SessionNotFound,
)
from gradbank.losses.loss import Loss
from gradbank.memory import CrossBatchMemory
from gradbank.remote.ladder import Via, transport_to
from gradbank.remote.loss import RemoteLoss
from gradbank.remote.producer import Producer
from gradbank.remote.stats import ComponentInfo, ServerInfo, SessionInfo, SessionStats, StatsWatch
from gradbank.remote.stream import end_beside
from gradbank.remote.tenure import Tenure
from gradbank.remote.transport import SLOWEST_BYTES_PER_S, Transport, left_until
from gradbank.v1 import catalog_pb2, session_pb2, stats_pb2
from gradbank.wire import LONGEST_S, component_message, state_message

L = TypeVar("L", bound=Loss)


def connect(address: str, timeout: float = 30.0, via: Via = "auto") -> "Client":
    """Connects to a server.

    Args:
        address: `"host:port"`; `"unix:///path"` for a socket of this machine (`gradbank serve --unix-socket`); or
            `"local://"` for a server inside this process (which needs `gradbank[server]`).
        timeout: seconds that any call may take; a step that cannot be answered is tried again until then.
        via: how to go to the server. `"auto"` takes the fastest way that it offers to this process, which `client.via`
            then tells: `"shm"`, steps through shared memory (`gradbank serve --shared-memory`, same machine, same
            user); `"unix"`, a socket of this machine; or `"tcp"`. Each can be insisted on.

    Raises:
        InvalidRequest: an address of neither form, or a way that the server does not offer to this process.
        ServerUnavailable: no server listens there.
        DeadlineExceeded: it does not answer in time.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise InvalidRequest(
            f"timeout must be above 0 seconds, got {timeout!r}; math.inf waits for as long as it takes"
        )
    timeout = min(timeout, LONGEST_S)
    return Client(transport_to(address, timeout, via), address, timeout)


class Client:
    """A connection to one server. Use it as a context manager, or `close` it.

    Attributes:
        address: the server's, as it was given.
        timeout: seconds that any call may take.

    It belongs to the process that made it: in a forked child (a DataLoader worker) every call raises `ForkedClient`.
    """

    def __init__(self, transport: Transport, address: str, timeout: float) -> None:
        self.address, self.timeout = address, timeout
        self._transport = transport
        self._process = os.getpid()
        self._closed = False
        # one that is dropped ends its connection too, which is a place at the server
        self._dropped = weakref.finalize(self, _end, transport, os.getpid())
        self._dropped.atexit = False
        self._open: dict[
            tuple[str, int], RemoteLoss[Any]
        ] = {}  # by session and rank, which one of them holds at a time

    @property
    def via(self) -> str:
        """How steps go to the server: "local", "shm", "unix" or "tcp"."""
        return self._transport.via

    def __repr__(self) -> str:
        return f"Client({self.address!r}, via={self.via!r})"

    def open(self, name: str, loss: L, rank: int = 0, wire: torch.dtype | None = None) -> RemoteLoss[L]:
        """`loss`, hosted by the server under `name`: call it as you would call `loss`.

        The first to open a name creates the session, from the loss as it is: weights and a bank that is not empty
        are sent along. Whoever opens it later, with an equal loss, joins it as it is there. A loss that this client
        opened before at that rank is closed, once the server knows all that its optimizer has to tell.

        Args:
            name: letters, digits, '.', '_' and '-'; at most 64.
            rank: which of the session's trainers this is. Two trainers of one rank exclude each other: the newer one
                takes the rank over.
            wire: `torch.bfloat16` or `torch.float16`, to send embeddings and gradients in half the bytes, rounded to 8
                or 11 significant bits; the loss is computed in float32 nonetheless. None sends them as they are.

        Raises:
            SessionConflict: the name is taken by another loss; the message names the difference.
            InvalidComponent: the server does not know the loss, or an argument of it.
            LimitExceeded: the server is full, or the bank too large for it.
            InvalidUpdate: the loss that was open under this name had an optimizer, whose last step the server refuses;
                the next call opens it.
        """
        transport = self._checked()
        if not isinstance(loss, Loss):
            raise InvalidRequest(
                f"client.open hosts a gradbank loss, got {type(loss).__module__}.{type(loss).__name__}"
            )
        if not isinstance(name, str):
            raise InvalidRequest(f"the name of a session must be a string, got {name!r}")
        if isinstance(rank, bool) or not (isinstance(rank, Integral) and 0 <= rank < 2**32):
            raise InvalidRequest(f"rank must be a whole number from 0 on, got {rank!r}")
        rank = int(rank)
        if wire not in (None, torch.bfloat16, torch.float16):
            raise InvalidRequest(f"wire must be torch.bfloat16, torch.float16 or None, got {wire!r}")
        _refuse_tied(loss)
        known, deadline = self._open.get((name, rank)), time.monotonic() + self.timeout
        if known is not None:
            with suppress(Fenced, SessionNotFound):  # nobody is left to tell
                known.flush(left_until(deadline))
        named, payload = state_message(_state_to_send(loss))
        try:
            asked = component_message(loss.spec())
        except TypeError as error:
            raise InvalidComponent(f"the loss cannot be told to a server: {error}") from None
        header = session_pb2.CreateSessionRequest(name=name, loss=asked, state=named)
        deadline += sum(len(part) for part in payload) / SLOWEST_BYTES_PER_S
        created = transport.create_session(header, payload, left_until(deadline))
        tenure = Tenure(self._checked, name, rank, secrets.token_bytes(16), time.time_ns())
        tenure.attach(left_until(deadline), None if known is None else known.producer.tenure)
        remote = RemoteLoss(Producer(self._checked, tenure, self.timeout), loss, created.created, wire)
        replaced, self._open[name, rank] = self._open.get((name, rank)), remote
        if replaced is not None:
            replaced.retire()
        return remote

    def sessions(self) -> list[SessionInfo]:
        """Every session of the server, by name."""
        response = self._call("ListSessions", session_pb2.ListSessionsRequest())
        return [SessionInfo.of(session) for session in response.sessions]

    def close_session(self, name: str) -> bool:
        """Ends a session and frees what it holds, for all its trainers; whether there was one."""
        self._checked()
        for held in [held for held in self._open if held[0] == name]:
            closed = self._open.pop(held, None)  # another thread may have
            if closed is not None:
                closed.close()
        return bool(self._call("CloseSession", session_pb2.CloseSessionRequest(session=name)).existed)

    def stats(self, name: str) -> SessionStats:
        """What a session has been doing.

        Raises:
            SessionNotFound: there is none of that name.
        """
        return SessionStats.of(self._call("GetStats", stats_pb2.GetStatsRequest(session=name)).stats)

    def watch(self, name: str, interval: float = 1.0) -> StatsWatch:
        """The same every `interval` seconds, until the session ends or the iterator is closed."""
        request = stats_pb2.WatchStatsRequest(session=name, interval_s=min(interval, LONGEST_S))
        return StatsWatch(self._checked().watch(request, self.timeout), self)

    def server(self) -> ServerInfo:
        """What the server is and what it allows."""
        return ServerInfo.of(self._call("GetServer", stats_pb2.GetServerRequest()))

    def catalog(self) -> list[ComponentInfo]:
        """Every component that the server can build."""
        response = self._call("ListComponents", catalog_pb2.ListComponentsRequest())
        return [ComponentInfo.of(info) for info in response.components]

    def close(self) -> None:
        """Tells the server what optimizers still have to tell it, and ends the connection. Sessions live on.

        It takes no longer than any call may, however many optimizers there are.

        Raises:
            GradbankError: an optimizer's last step could not be carried out; everything is closed nonetheless.
        """
        if os.getpid() != self._process or self._closed:
            return
        failures, deadline = [], time.monotonic() + self.timeout
        for remote in list(self._open.values()):
            try:
                remote.flush(left_until(deadline))
            except (ServerUnavailable, SessionNotFound):
                pass  # nobody is left to tell
            except GradbankError as error:
                failures.append(error)
            remote.close()
        self._open, self._closed = {}, True
        self._dropped.detach()
        self._transport.close()
        if failures:
            raise failures[0]

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except GradbankError:
            if kind is None:  # or it would hide the error that ends the block
                raise

    def _call(self, method: str, request: Any) -> Any:
        return self._checked().call(method, request, self.timeout)

    def _checked(self) -> Transport:
        """The transport, if it is open and this is the process it belongs to."""
        if os.getpid() != self._process:
            raise ForkedClient(
                f"the connection to {self.address} was made in process {self._process} and is used in its child "
                f"{os.getpid()}, where gRPC would hang; call the loss in the main process, and not in a DataLoader "
                "worker, or connect in the child"
            )
        if self._closed:
            raise ServerUnavailable(f"the connection to {self.address} was closed here: connect again")
        return self._transport


def _end(transport: Transport, process: int) -> None:
    """Ends a connection in the process that it belongs to: in a forked child it is still the parent's."""
    if os.getpid() == process:
        end_beside(transport.close)


def _refuse_tied(loss: Loss) -> None:
    """Refuses what learns at two places of a loss at once.

    Raises:
        InvalidRequest: a server builds each place anew, and would learn two of it.
    """
    places: dict[int, str] = {}
    for name, weight in loss.named_parameters(remove_duplicate=False):
        if weight.requires_grad and places.setdefault(id(weight), name) != name:
            raise InvalidRequest(
                f"{places[id(weight)]} and {name} are one here, and a server would learn two of them: host a loss that "
                "has it at one place"
            )


def _state_to_send(loss: Loss) -> dict[str, torch.Tensor]:
    """What a fresh copy of the loss would lack: its weights, and the queues that hold rows."""
    state: dict[str, torch.Tensor] = {}
    for path, module in loss.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if not isinstance(module, CrossBatchMemory) or len(module):  # an empty one is not even allocated
            module._save_to_state_dict(state, prefix, keep_vars=False)
        if isinstance(module, Component):  # an argument that is a parameter is told as an argument
            for each in argument_fields(type(module)):
                if not each.metadata.get("weight"):
                    state.pop(prefix + each.name, None)
    return state
