"""The process at the other end of the floors and of the bare echo."""

import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from multiprocessing.connection import Connection
from typing import NamedTuple

import floor
import grpc
import shared_floor

from gradbank.v1 import step_pb2
from gradbank.wire import Assembly, Frame, chunks, nbytes, request_frame


class Places(NamedTuple):
    """Where the contenders listen: ports of the TCP floor and of the bare echo, and the socket of the floor in shared
    memory."""

    tcp_floor: int
    shared_floor: str
    bare: int


def bare() -> tuple[grpc.Server, int]:
    """A gRPC server that answers each step of a stream with its own embeddings, with no session behind it."""

    def steps(requests: Iterator[Frame], context: grpc.ServicerContext) -> Iterator[Frame]:
        for frame in requests:
            assert isinstance(frame.step, step_pb2.StepInput)
            payload = Assembly(frame.step.payload_bytes)
            for part in frame.payload:
                payload.add(part)
            while not payload.complete:
                for part in next(requests).payload:
                    payload.add(part)
            embeddings = payload.payload()[: nbytes(frame.step.embeddings)].numpy().data
            output = step_pb2.StepOutput(seq=frame.step.seq, payload_bytes=len(embeddings))
            for i, piece in enumerate(chunks([embeddings])):
                yield Frame(output if i == 0 else None, piece)

    server = grpc.server(futures.ThreadPoolExecutor(4))
    handler = grpc.stream_stream_rpc_method_handler(steps, request_frame, Frame.encoded)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("gradbank.v1.StepService", {"Steps": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return server, port


def run(pipe: Connection) -> None:
    """Sends where everything listens, and ends when it is sent something."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as shared:
        plain = socket.create_server(("127.0.0.1", 0))
        shared.bind(f"{folder}/floor")
        shared.listen()
        for serve, listener in ((floor.serve, plain), (shared_floor.serve, shared)):
            threading.Thread(target=_again_and_again, args=(serve, listener), daemon=True).start()
        echo, echo_port = bare()
        pipe.send(Places(plain.getsockname()[1], shared.getsockname(), echo_port))
        pipe.recv()
        echo.stop(0)


def _again_and_again(serve: Callable[[socket.socket], None], listener: socket.socket) -> None:
    while True:
        serve(listener)
