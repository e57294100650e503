"""The client: a loss that is computed by a server, and trained through like any other."""

from gradbank.remote.client import Client, connect
from gradbank.remote.loss import RemoteLoss
from gradbank.remote.optimizer import RemoteOptimizer

__all__ = ["Client", "RemoteLoss", "RemoteOptimizer", "connect"]
