"""Metric-learning losses and memory banks, computed here or on a server that answers with the gradients.

import gradbank
from gradbank import losses

loss_fn = losses.CrossBatchMemory(losses.NTXentLoss(), embedding_size=128, memory_size=65536)
loss = loss_fn(embeddings, labels)                    # here, in this process

with gradbank.connect("gpu-box:50051") as client:
    loss_fn = client.open("my-run", loss_fn)          # the same object, hosted by the server
    loss = loss_fn(embeddings, labels)                # one round trip: the loss and its gradient
    loss.backward()
"""

from gradbank import distances, engine, errors, losses, miners, reducers, regularizers
from gradbank.component import Component, component
from gradbank.errors import GradbankError
from gradbank.remote import Client, RemoteLoss, RemoteOptimizer, connect

__version__ = "0.1.0"

__all__ = [
    "Client",
    "Component",
    "GradbankError",
    "RemoteLoss",
    "RemoteOptimizer",
    "component",
    "connect",
    "distances",
    "engine",
    "errors",
    "losses",
    "miners",
    "reducers",
    "regularizers",
]
