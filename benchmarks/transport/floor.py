"""The least that a step can cost between two processes: its bytes through a plain TCP socket, there and back."""

import socket
import struct
from types import TracebackType

import torch
from torch import Tensor

_HEADER = struct.Struct("<QQ")  # bytes of the embeddings, bytes of the labels


def serve(listener: socket.socket) -> None:
    """Answers every batch of one connection with its embeddings, until the connection ends."""
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    header, batch = bytearray(_HEADER.size), bytearray()
    with connection:
        while _received(connection, memoryview(header)):
            embeddings, labels = _HEADER.unpack(header)
            if len(batch) != embeddings + labels:
                batch = bytearray(embeddings + labels)
            _received(connection, memoryview(batch))
            _send(connection, [memoryview(header), memoryview(batch)[:embeddings]])


class Floor:
    """The trainer's end."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._header = bytearray(_HEADER.size)

    def step(self, embeddings: Tensor, labels: Tensor, gradient: Tensor) -> None:
        """Sends a batch, and receives as many bytes as its embeddings have into `gradient`."""
        parts = [_bytes_of(embeddings), _bytes_of(labels)]
        _send(self._socket, [memoryview(_HEADER.pack(*map(len, parts))), *parts])
        _received(self._socket, memoryview(self._header))
        _received(self._socket, _bytes_of(gradient))

    def __enter__(self) -> "Floor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()


def _bytes_of(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return view


def _send(connection: socket.socket, parts: list[memoryview]) -> None:
    while parts:
        sent = connection.sendmsg(parts)
        while parts and sent >= len(parts[0]):
            sent -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][sent:]


def _received(connection: socket.socket, into: memoryview) -> bool:
    """Whether as much came as there is room for, before the other end closed."""
    while len(into):
        number = connection.recv_into(into, 0, socket.MSG_WAITALL)
        if not number:
            return False
        into = into[number:]
    return True
