"""Who is let in: so many streams and transfers at once, and nobody once the server is closing."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gradbank.errors import LimitExceeded, ServerUnavailable


class Gate:
    """Counts streams of steps or statistics and, apart from them, transfers of a session's state: a server whose
    trainers have taken all streams still hands out what they have learned.

    Attributes:
        closing: set when the server shuts down.
    """

    def __init__(self, streams: int) -> None:
        self._streams, self._free, self._transfers = streams, *(threading.Semaphore(streams) for _ in range(2))
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
        with _place(self._free, f"{self._streams} streams are taken; close losses that are not used any more"):
            yield

    @contextmanager
    def transfer(self) -> Iterator[None]:
        """A place for a call that takes or gives a session's state, likewise."""
        with _place(self._transfers, f"{self._streams} places for a session's state are taken; try again"):
            yield


@contextmanager
def _place(free: threading.Semaphore, otherwise: str) -> Iterator[None]:
    if not free.acquire(blocking=False):
        raise LimitExceeded(f"all {otherwise}, or start the server with a larger --max-streams")
    try:
        yield
    finally:
        free.release()
