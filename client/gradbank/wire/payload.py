"""The bytes of many tensors as a row of messages of bounded size."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from gradbank.errors import InvalidRequest

MESSAGE_BYTES = 4 * 2**20  # the largest message either side takes; bounds what a peer can make the other hold
PACKET_BYTES = 2**16  # the largest message beside shared memory
LONGEST_S = 10 * 365 * 24 * 3600.0  # longer than anything takes; beyond it clocks and locks lose count
CHUNK_BYTES = 2**20  # the largest part of a payload in a message


def chunks(buffers: Iterable[memoryview], size: int = CHUNK_BYTES) -> Iterator[list[memoryview]]:
    """The buffers laid end to end, cut into pieces of `size` bytes: each the views that make it up, for nothing is
    copied. At least one, which may be empty."""
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
                yield parts
                parts, held, yielded = [], 0, True
    if parts or not yielded:  # an empty piece after a full one would be taken for the next message
        yield parts


class Assembly:
    """A payload of known size that arrives in pieces, and is written to where its tensors will lie.

    Memory is the system's until it is written to, so that what was only announced takes none.
    """

    def __init__(self, size: int) -> None:
        self._buffer, self._held = torch.empty(size, dtype=torch.uint8, device="cpu"), 0
        self._bytes = self._buffer.numpy().data

    def add(self, part: bytes | memoryview) -> None:
        """Takes the next piece.

        Raises:
            InvalidRequest: the pieces are longer than the payload.
        """
        stop = self._held + len(part)
        if stop > len(self._buffer):
            raise InvalidRequest(f"a payload of {len(self._buffer)} bytes was announced, and at least {stop} came")
        self._bytes[self._held : stop] = part
        self._held = stop

    @property
    def complete(self) -> bool:
        return self._held == len(self._buffer)

    def payload(self) -> Tensor:
        """`(size,)` uint8: all of it.

        Raises:
            InvalidRequest: the pieces are shorter than the payload.
        """
        if not self.complete:
            raise InvalidRequest(f"a payload of {len(self._buffer)} bytes was announced, and {self._held} came")
        return self._buffer


def assembled(parts: Iterable[memoryview]) -> Tensor:
    """The buffers laid end to end: `(size,)` uint8."""
    held = list(parts)
    assembly = Assembly(sum(map(len, held)))
    for part in held:
        assembly.add(part)
    return assembly.payload()
