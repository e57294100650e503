"""`gradbank demo`: a real server, a real network, real data, and a check of every claim on the way."""

from gradbank_server.demo.run import run

__all__ = ["run"]
