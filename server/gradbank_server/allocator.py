"""How a server's memory is kept between steps."""

import ctypes

_M_ARENA_MAX = -8  # of mallopt(3)


def use_one_arena() -> bool:
    """Has glibc give all threads memory of one arena; whether there is a glibc that does.

    gRPC computes each stream's steps in a thread of its own, and glibc gives a thread an arena of its own. Such an
    arena hands freed tiles back to the system, to be faulted in again by the next step; the first one, of which the
    engine has seen to that, keeps up to 32 MiB of them. To be called before there are threads.
    """
    return _told("mallopt", _M_ARENA_MAX, 1)


def give_back() -> bool:
    """Has glibc give what is free back to the system; whether there was anything. It takes some milliseconds."""
    return _told("malloc_trim", 0)


def _told(name: str, *arguments: int) -> bool:
    try:
        return bool(getattr(ctypes.CDLL(None), name)(*arguments))
    except (AttributeError, OSError, TypeError):  # another allocator, or another system: what it does is its own
        return False
