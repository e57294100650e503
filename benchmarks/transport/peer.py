"""The process at the other end: a real server, and the floor's."""

import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent import futures
from multiprocessing.connection import Connection

import grpc
import structlog
from floor import serve

from gradbank.v1 import step_pb2
from gradbank.wire import Assembly, Frame, chunks, nbytes, request_frame
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings


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
    """Sends the ports of floor and bare echo and the server's addresses by name, and ends when it is sent something."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))  # the table is all there is to see
    place = f"{tempfile.mkdtemp()}/gradbank.sock"
    settings = ServerSettings(port=0, metrics_port=-1, unix_socket=place, components=("echo",))
    with Server(settings) as server:
        listener = socket.create_server(("127.0.0.1", 0))

        def floors() -> None:
            while True:
                serve(listener)

        threading.Thread(target=floors, daemon=True).start()
        echo, echo_port = bare()
        addresses = {"gRPC over TCP": server.address, "over a unix socket": f"unix://{place}"}
        pipe.send((listener.getsockname()[1], echo_port, addresses))
        pipe.recv()
        echo.stop(0)
