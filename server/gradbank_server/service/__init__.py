"""Protobuf in, protobuf out: everything that happens, happens in `gradbank_server.sessions`."""

from gradbank_server.service.server import Server
from gradbank_server.service.service import Service

__all__ = ["Server", "Service"]
