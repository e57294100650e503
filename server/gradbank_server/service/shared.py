"""Steps through shared memory, for trainers of the server's user on its machine; see shared.proto."""

import os
import shutil
import socket
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog

from gradbank.errors import GradbankError, InvalidRequest
from gradbank.v1 import shared_pb2
from gradbank.wire import error_message
from gradbank_server.service.conversation import Conversation
from gradbank_server.service.faults import fault
from gradbank_server.service.gate import Gate
from gradbank_server.service.room import Budget, check_shareable
from gradbank_server.service.service import Service

log = structlog.get_logger()

_PREFIX = "gradbank-"
_FRESH_S = 60.0  # for so long a server may be about to listen
_ENDS_WITHIN_S = 2.0  # a thread whose connection has ended
_PAUSE_S = 0.1  # before a trainer is accepted again
_CREDENTIALS = struct.Struct("3i")  # of struct ucred: process, user, group


class SharedMemory:
    """Listens on a socket in a folder that only the server's user may enter, from `start` to `stop`.

    Args:
        max_bytes: how much all trainers may share with the server, together.

    Raises:
        InvalidRequest: a system that cannot do this.
    """

    def __init__(self, service: Service, gate: Gate, max_bytes: int) -> None:
        check_shareable()
        self._service, self._gate, self._budget = service, gate, Budget(max_bytes)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._folder = ""
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()

    def start(self) -> str:
        """The path of the socket."""
        _remove_left_behind(Path(tempfile.gettempdir()))
        self._folder = tempfile.mkdtemp(prefix=_PREFIX)  # of mode 0700
        path = str(Path(self._folder, "shared"))
        try:
            self._listener.bind(path)
        except OSError as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise OSError(f"cannot listen for shared memory at {path}: {error}; set TMPDIR to another folder") from None
        self._listener.listen(64)
        self._start(self._accept)
        return path

    def stop(self) -> None:
        """Ends every connection, and its thread; the gate has seen to it that no step is under way."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with self._lock:
            for each in (self._listener, *self._open):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
            threads = list(self._threads)
        until = time.monotonic() + _ENDS_WITHIN_S
        for thread in threads:  # the last to have the sessions may not be one that Python ends as it lets go of tensors
            thread.join(max(until - time.monotonic(), 0.0))

    def _accept(self) -> None:
        with self._listener:
            while not self._gate.closing.is_set():
                try:
                    self._take_in()
                except (OSError, RuntimeError) as error:  # no descriptor or thread is left, and soon may be; or stopped
                    if not self._gate.closing.wait(_PAUSE_S):
                        log.warning("cannot accept a trainer to shared memory", error=str(error))

    def _take_in(self) -> None:
        connection, _ = self._listener.accept()
        try:
            self._start(self._serve, connection)
        except RuntimeError:
            connection.close()
            raise

    def _start(self, call: Callable[..., None], *arguments: socket.socket) -> None:
        """Makes a call in a thread that `stop` waits for."""
        thread = threading.Thread(target=call, args=arguments, name="gradbank-shared", daemon=True)
        thread.start()
        with self._lock:
            self._threads = {thread, *(each for each in self._threads if each.is_alive())}

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            with self._lock:
                self._open.add(connection)
            try:
                with self._gate.stream():
                    self._check_user(connection)
                    Conversation(self._service, self._gate, self._budget, connection).hold()
            except GradbankError as error:
                self._service.refused(error)
                _say(connection, shared_pb2.SharedResponse(error=error_message(error)))
            except OSError:
                pass  # the trainer went away
            except Exception as error:
                _say(connection, shared_pb2.SharedResponse(error=error_message(fault(error))))
            finally:
                with self._lock:
                    self._open.discard(connection)
                with suppress(OSError):  # the trainer may have ended it
                    connection.shutdown(socket.SHUT_RDWR)  # which wakes a thread that reads ahead, as closing does not

    def _check_user(self, connection: socket.socket) -> None:
        """Refuses the processes of other users, should they get at the socket."""
        told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        process, user, _ = _CREDENTIALS.unpack(told)
        if user != os.geteuid():
            log.warning("refused another user's process", process=process, user=user)
            raise InvalidRequest("only processes of the server's own user may share memory with it")


def _remove_left_behind(folder: Path) -> None:
    """Removes what servers of this user left in a folder when they were killed."""
    for each in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # it went meanwhile, or is not what it seems
            found, place = each.lstat(), each / "shared"
            fresh = time.time() - found.st_mtime < _FRESH_S
            if fresh or found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode) or not place.is_socket():
                continue
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                probe.settimeout(1)
                try:
                    probe.connect(str(place))
                except ConnectionRefusedError:  # nobody listens
                    shutil.rmtree(each, ignore_errors=True)


def _say(connection: socket.socket, response: shared_pb2.SharedResponse) -> None:
    with suppress(OSError):
        connection.sendall(response.SerializeToString())
