"""The process at the other end: a real server, and the floor's."""

import socket
import threading
from multiprocessing.connection import Connection

from floor import serve

from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings


def run(pipe: Connection) -> None:
    """Sends the floor's port and the server's addresses by name, and ends when something is sent back."""
    with Server(ServerSettings(port=0, metrics_port=-1, components=("echo",), log_level="error")) as server:
        listener = socket.create_server(("127.0.0.1", 0))

        def floors() -> None:
            while True:
                serve(listener)

        threading.Thread(target=floors, daemon=True).start()
        pipe.send((listener.getsockname()[1], {"gRPC over TCP": server.address}))
        pipe.recv()
