"""The bytes of many tensors as a row of messages of bounded size."""

from collections.abc import Iterable, Iterator

from gradbank.errors import InvalidRequest

MESSAGE_BYTES = 4 * 2**20  # the largest message either side takes; bounds what a peer can make the other hold
CHUNK_BYTES = 2**20  # the largest part of a payload in a message


def chunks(buffers: Iterable[memoryview], size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The buffers laid end to end, cut into pieces of `size` bytes; at least one, which may be empty."""
    parts: list[memoryview] = []
    held, yielded = 0, False
    for buffer in buffers:
        start = 0
        while start < len(buffer):
            part = buffer[start : start + size - held]
            parts.append(part)
            held += len(part)
            start += len(part)
            if held == size:
                yield b"".join(parts)
                parts, held, yielded = [], 0, True
    if parts or not yielded:  # an empty piece after a full one would be taken for the next message
        yield b"".join(parts)


class Assembly:
    """A payload of known size that arrives in pieces."""

    def __init__(self, size: int) -> None:
        self._size, self._held = size, 0
        self._parts: list[bytes] = []

    def add(self, part: bytes) -> None:
        """Takes the next piece.

        Raises:
            InvalidRequest: the pieces are longer than the payload.
        """
        self._held += len(part)
        if self._held > self._size:
            raise InvalidRequest(f"a payload of {self._size} bytes was announced, and at least {self._held} came")
        self._parts.append(part)

    @property
    def complete(self) -> bool:
        return self._held == self._size

    def bytes(self) -> bytes:
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
