"""Memory that the server shares with a trainer's process."""

import fcntl
import mmap
import os
import threading

from gradbank.errors import InvalidRequest, LimitExceeded

_NOEXEC_SEAL = 0x0008  # MFD_NOEXEC_SEAL of linux/memfd.h, since 6.3
_FUTURE_WRITE = 0x0010  # F_SEAL_FUTURE_WRITE of linux/fcntl.h


def check_shareable() -> None:
    """Raises InvalidRequest on a system without memory that can be sealed."""
    if not hasattr(os, "memfd_create"):
        raise InvalidRequest("--shared-memory needs Linux, whose memory can be sealed; leave it out here")


class Budget:
    """So many bytes may be shared at once, by all trainers together."""

    def __init__(self, size: int) -> None:
        self._size, self._left, self._lock = size, size, threading.Lock()

    def take(self, size: int) -> None:
        """Raises LimitExceeded if that is more than is left."""
        with self._lock:
            if size > self._left:
                raise LimitExceeded(
                    f"steps in flight need {size:,} bytes of shared memory, and of the {self._size:,} that there may "
                    f"be {self._left:,} are free; start the server with a larger --max-shared-bytes, or connect with "
                    'via="unix" or via="tcp"'
                )
            self._left -= size

    def give_back(self, size: int) -> None:
        with self._lock:
            self._left += size


class Room:
    """A piece of memory without a name, which only who is handed its descriptor can map.

    It is sealed: nobody can cut it short, which would end whoever reads it, and a peer that is not to write cannot.

    Args:
        size: bytes of each slot, all of which are there from the start.
        slots: how many there are.
        read_only: whether the peer may only read.

    Raises:
        LimitExceeded: the system has not as much.

    Attributes:
        descriptor: what the peer is handed; `handed_over` closes it here.
        bytes: all of it, here.
    """

    def __init__(self, size: int, slots: int, read_only: bool) -> None:
        self.size, self.slots = size, slots
        whole = size * slots
        self.descriptor = _memory()
        try:
            os.posix_fallocate(self.descriptor, 0, whole)
            self.bytes = memoryview(mmap.mmap(self.descriptor, whole))  # before no other may be writable
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals | (_FUTURE_WRITE if read_only else 0))
        except OSError as error:
            os.close(self.descriptor)
            raise LimitExceeded(f"the server's system has no {whole:,} bytes of shared memory: {error}") from None

    def slot(self, number: int) -> memoryview:
        """The slot of the step of that number."""
        start = number % self.slots * self.size
        return self.bytes[start : start + self.size]

    def handed_over(self) -> None:
        """The memory lives on, here and with the peer, until both have let go of it."""
        os.close(self.descriptor)


def _memory() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("gradbank", flags | _NOEXEC_SEAL)
    except OSError:  # an older system
        return os.memfd_create("gradbank", flags)
