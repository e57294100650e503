"""Who is let in: so many streams at once, and nobody once the server is closing."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from gradbank.errors import LimitExceeded, ServerUnavailable


class Gate:
    """Counts streams.

    Attributes:
        closing: set when the server shuts down.
    """

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._free = threading.Semaphore(streams)
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
        if not self._free.acquire(blocking=False):
            raise LimitExceeded(
                f"all {self._streams} streams are taken; close losses that are not used any more, or start the server "
                "with a larger --max-streams"
            )
        try:
            yield
        finally:
            self._free.release()
