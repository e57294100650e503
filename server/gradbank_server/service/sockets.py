"""A socket of the file system, for trainers on the same machine: no port, and the system says who may open it."""

import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from gradbank.errors import InvalidRequest

_LONGEST = 100  # bytes; systems allow 104 to 108
_PATIENCE_S, _PAUSE_S = 5.0, 0.02


def listen_on_socket(server: grpc.Server, path: str) -> None:
    """Has a server listen at `path` as well. Only the user that the server runs as may open it.

    gRPC removes the socket when the server stops; one that a server left when it was killed is replaced.

    Raises:
        InvalidRequest: a path that is not absolute, or too long for a socket.
        OSError: a directory that is not there, something else at the path, or a server that listens there.
    """
    place = Path(path)
    if not place.is_absolute() or len(os.fsencode(path)) > _LONGEST or set(path) & set("%?#"):  # which URIs read anew
        raise InvalidRequest(
            f"--unix-socket takes an absolute path of at most {_LONGEST} bytes without %, ? and #, got {path!r}"
        )
    if not place.parent.is_dir():
        raise OSError(f"cannot listen on {place}: there is no directory {place.parent}")
    with _alone(place):
        _make_room(place)
        before = os.umask(0o177)  # it is never open to others, not even for a moment
        try:
            server.add_insecure_port(f"unix://{place}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {place}: {error}") from None
        finally:
            os.umask(before)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """While no other server makes a socket in the directory: of two that find the same one left behind, the second
    would take away what the first has put in its place."""
    directory, until = os.open(place.parent, os.O_RDONLY), time.monotonic() + _PATIENCE_S
    try:
        while True:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise OSError(f"cannot listen on {place}: somebody holds a lock on {place.parent}") from None
                time.sleep(_PAUSE_S)
        yield
    finally:
        os.close(directory)


def _make_room(place: Path) -> None:
    try:
        found = place.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise OSError(f"cannot listen on {place}: something else is there, which is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(place))
        except ConnectionRefusedError:  # nobody listens: it was left behind
            place.unlink()
            return
    raise OSError(f"cannot listen on {place}: a server listens there already")
