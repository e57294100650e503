"""The process at the other end: a real server, and the floor's."""

import socket
import tempfile
import threading
from multiprocessing.connection import Connection

import structlog
from floor import serve

from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings


def run(pipe: Connection) -> None:
    """Sends the floor's port and the server's addresses by name, and ends when something is sent back."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))  # the table is all there is to see
    place = f"{tempfile.mkdtemp()}/gradbank.sock"
    settings = ServerSettings(port=0, metrics_port=-1, unix_socket=place, components=("echo",))
    with Server(settings) as server:
        listener = socket.create_server(("127.0.0.1", 0))

        def floors() -> None:
            while True:
                serve(listener)

        threading.Thread(target=floors, daemon=True).start()
        pipe.send(
            (listener.getsockname()[1], {"gRPC over TCP": server.address, "over a unix socket": f"unix://{place}"})
        )
        pipe.recv()
