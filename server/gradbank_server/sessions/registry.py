"""The open sessions, by name, and what each of them may hold."""

import itertools
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradbank.errors import InvalidRequest, LimitExceeded, SessionConflict, SessionNotFound
from gradbank.losses.loss import Loss
from gradbank.spec import Spec, same
from gradbank_server.sessions.session import Clock, Run, Session, banks_of, here
from gradbank_server.storage import Storage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Limits:
    """What sessions may hold.

    Attributes:
        sessions: how many there may be.
        session_bytes: how many bytes the bank and the weights of one may take.
    """

    sessions: int = 64
    session_bytes: int = 8 * 2**30


class Sessions:
    """The sessions of a server.

    Args:
        build: makes a loss from its spec, with every argument checked.
        clock: seconds that never go back.
        run: has steps computed.
    """

    def __init__(
        self,
        build: Callable[[Spec], Loss],
        device: torch.device,
        limits: Limits,
        storage: Storage,
        clock: Clock,
        run: Run = here,
    ) -> None:
        self._build, self._device, self._limits = build, device, limits
        self._storage, self._clock, self._run = storage, clock, run
        self._open: dict[str, Session] = {}
        self._coming: set[str] = set()  # names of sessions that are being made, or ended
        self._changed = threading.Condition()

    def create(self, name: str, spec: Spec, state: dict[str, Tensor]) -> tuple[Session, bool]:
        """The session of that name, and whether this call created it.

        Raises:
            InvalidRequest: a name that cannot be, or a state that does not fit.
            InvalidComponent: a spec that cannot be built.
            SessionConflict: the name is taken by a session with another spec.
            LimitExceeded: too many sessions, or too large a bank or weights.
        """
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"a session's name has letters, digits, '.', '_' and '-', at most 64, the first a letter or digit; "
                f"got {name[:80]!r}"
            )
        check_size(spec, self._limits.session_bytes)
        with torch.device("meta"):  # the spec with every default, at the price of no weights
            made = self._build(spec)
        check_whole(made, self._limits.session_bytes)
        asked = made.spec()
        with self._changed:
            while name in self._coming:
                self._changed.wait()
            known = self._open.get(name)
            if known is not None:
                if asked != known.spec:
                    raise SessionConflict(f"session {name!r} exists and differs: {difference(known.spec, asked)}")
                return known, False
            if len(self._open) + len(self._coming) >= self._limits.sessions:
                raise LimitExceeded(
                    f"all {self._limits.sessions} sessions are taken; close one, or start the server with a larger "
                    "--max-sessions"
                )
            self._coming.add(name)
        session = None
        try:  # outside the lock: other sessions go on while weights are made and moved
            loss = self._build(spec)
            _load(loss, state)
            check_whole(loss, self._limits.session_bytes)  # again, for weights may have come in another dtype
            loss = loss.to(self._device)
            session = Session(name, loss, asked, self._device, self._storage, self._clock, self._run)
            return session, True
        finally:
            with self._changed:
                self._coming.discard(name)
                if session is not None:
                    self._open[name] = session
                self._changed.notify_all()

    def __getitem__(self, name: str) -> Session:
        """The session of that name.

        Raises:
            SessionNotFound: there is none.
        """
        with self._changed:
            session = self._open.get(name)
        if session is None:
            raise SessionNotFound(
                f"no session is called {name[:80]!r}: it was not created here, was closed, or the server was restarted"
            )
        return session

    def __len__(self) -> int:
        return len(self._open)

    def all(self) -> list[Session]:
        """Every session, by name."""
        with self._changed:
            return [self._open[name] for name in sorted(self._open)]

    def close(self, name: str) -> bool:
        """Ends a session, once no step of it is under way; whether there was one."""
        with self._changed:
            session = self._open.pop(name, None)
            if session is None:
                return False
            self._coming.add(name)  # nobody may have the name before who holds this session's ranks is forgotten
        try:
            session.close()
            self._storage.drop(name)
        finally:
            with self._changed:
                self._coming.discard(name)
                self._changed.notify_all()
        return True


_LABEL_BYTES = 8  # of each row of a bank


def check_size(spec: Spec, limit: int) -> None:
    """Refuses a bank or class weights larger than `limit` before a byte of them is allocated.

    Raises:
        LimitExceeded: the message names the size, the limit and the largest that fits.
    """
    arguments = spec.arguments
    dimension = arguments.get("embedding_size")
    for rows, beside in (("memory_size", _LABEL_BYTES), ("num_classes", 0)):
        count = arguments.get(rows, 0)
        if not (isinstance(dimension, int) and isinstance(count, int)):
            continue
        row = dimension * 4 + beside
        if count * row > limit:
            raise LimitExceeded(
                f"{spec.name} with {rows}={count} and embedding_size={dimension} takes {count * row:,} bytes in "
                f"float32, and a session may take {limit:,}: the largest {rows} that fits is {limit // row:,}"
            )
    for inner in _inner(arguments):
        check_size(inner, limit)


def _inner(value: Any) -> Iterator[Spec]:
    """The specs in an argument: itself, or those in its lists and dictionaries."""
    if isinstance(value, Spec):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _inner(item)


def check_whole(loss: Loss, limit: int) -> None:
    """The same by what was made, for all that it holds together.

    Raises:
        LimitExceeded: the message names the size and the limit.
    """
    banks = sum(bank.capacity * (bank.dimension * 4 + _LABEL_BYTES) for bank in banks_of(loss))
    weights = sum(tensor.nbytes for tensor in itertools.chain(loss.parameters(), loss.buffers()))
    if weights + banks > limit:
        raise LimitExceeded(
            f"{type(loss).__name__} takes {weights:,} bytes of weights and {banks:,} of banks with their labels, and a "
            f"session may take {limit:,}"
        )


def difference(known: Any, asked: Any, where: str = "") -> str:
    """The first place in which two specs, or arguments of theirs, differ, in words."""
    if isinstance(known, Spec) and isinstance(asked, Spec):
        if known.name != asked.name:
            return f"{where or 'the loss'} is a {known.name} there, and a {asked.name} here"
        there, here, prefix = known.arguments, asked.arguments, f"{where}." if where else ""
        parts = {prefix + name: (there.get(name), here.get(name)) for name in sorted(there | here)}
    elif isinstance(known, list) and isinstance(asked, list) and len(known) == len(asked):
        parts = {f"{where}[{i}]": pair for i, pair in enumerate(zip(known, asked))}
    elif isinstance(known, dict) and isinstance(asked, dict) and known.keys() == asked.keys():
        parts = {f"{where}[{key!r}]": (known[key], asked[key]) for key in known}
    else:
        return f"{where} is {_said(known)} there, and {_said(asked)} here"
    differing = [difference(*pair, path) for path, pair in parts.items() if not same(*pair)]
    return differing[0] if differing else "they are equal"


def _said(value: Any) -> str:
    return value.name if isinstance(value, Spec) else repr(value)


def _load(loss: Loss, state: dict[str, Tensor]) -> None:
    """Starts a loss from the given state; what is left out starts as the loss made it."""
    if not state:
        return
    known = {name: value.shape for name, value in loss.state_dict().items()}
    for name, value in state.items():
        if name not in known:
            raise InvalidRequest(f"the state has {name!r}, which {type(loss).__name__} does not")
        if value.shape != known[name]:
            raise InvalidRequest(f"{name} must have shape {tuple(known[name])}, got {tuple(value.shape)}")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InvalidRequest(f"{name} has entries that are not finite")
    try:
        loss.take_state(state)
    except RuntimeError as error:
        raise InvalidRequest(f"the state does not fit {type(loss).__name__}: {error}") from None
