"""Who is let in: so many streams and transfers at once, and nobody once the server is closing."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gradbank.errors import LimitExceeded, ServerUnavailable

_FEWEST = 16  # places for what is over soon, as a rule
_MORE = "or start the server with a larger --max-streams"


class Gate:
    """Counts streams of steps or statistics and, apart from them, transfers of a session's state: a server whose
    trainers have taken all streams still hands out what they have learned. Calls that wait for a session's turn are
    counted too, for they hold a thread until then, whether or not somebody still waits for them.

    Attributes:
        closing: set when the server shuts down.
        places: how many of all these there may be at once.
    """

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._turns_at_once = max(streams, _FEWEST)
        self._free, self._transfers = (threading.Semaphore(streams) for _ in range(2))
        self._turns, self._looks = threading.Semaphore(self._turns_at_once), threading.Semaphore(_FEWEST)
        self.places = 2 * streams + self._turns_at_once + _FEWEST
        self.closing = threading.Event()

    def check(self) -> None:
        """Refuses what would change something on a server that is closing.

        Raises:
            ServerUnavailable: it is.
        """
        if self.closing.is_set():
            raise ServerUnavailable("the server is shutting down; nothing was carried out")

    @contextmanager
    def stream(self) -> Iterator[None]:
        """A place for a stream, for as long as the block runs.

        Raises:
            LimitExceeded: there is none free.
        """
        with _place(self._free, f"{self._streams} streams are taken; close losses that are not used any more, {_MORE}"):
            yield

    @contextmanager
    def transfer(self) -> Iterator[None]:
        """A place for a call that takes or gives a session's state, likewise."""
        with _place(self._transfers, f"{self._streams} places for a session's state are taken; try again, {_MORE}"):
            yield

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A place for a call that waits for the turn of its session, likewise."""
        with _place(
            self._turns, f"{self._turns_at_once} places for calls that wait for a session are taken; try again, {_MORE}"
        ):
            yield

    @contextmanager
    def look(self) -> Iterator[None]:
        """A place for a stream of reflection, likewise."""
        with _place(self._looks, f"{_FEWEST} places for reflection are taken; try again"):
            yield


@contextmanager
def _place(free: threading.Semaphore, otherwise: str) -> Iterator[None]:
    if not free.acquire(blocking=False):
        raise LimitExceeded(f"all {otherwise}")
    try:
        yield
    finally:
        free.release()
