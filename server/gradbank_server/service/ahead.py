"""What comes next, read while what came before is dealt with."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Iterator[T], Generic[T]):
    """The items of an iterator, of which the next one can be read by another thread meanwhile.

    Who asks for an item that nobody reads yet reads it himself: a peer that waits for each answer before it sends the
    next step would only lose by another thread having to wake.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._reader: ThreadPoolExecutor | None = None
        self._next: Future[T | None] | None = None

    def read(self) -> None:
        """Has the next item read from now on; what goes wrong is raised when it is asked for."""
        if self._next is None:
            self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="gradbank-ahead")
            self._next = self._reader.submit(next, self._items, None)

    def __next__(self) -> T:
        read, self._next = self._next, None
        item = next(self._items, None) if read is None else read.result()
        if item is None:
            raise StopIteration
        return item

    def close(self) -> None:
        """Lets the thread go, once the iterator has ended, which is not waited for."""
        if self._reader is not None:
            self._reader.shutdown(wait=False)
