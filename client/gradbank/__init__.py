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

from gradbank import (
    aio,
    distances,
    engine,
    errors,
    evaluation,
    losses,
    miners,
    reducers,
    regularizers,
    samplers,
    wrappers,
)
from gradbank.component import Component, component
from gradbank.errors import GradbankError
from gradbank.pml import from_pml
from gradbank.remote import Client, RemoteLoss, RemoteOptimizer, connect

__version__ = "0.1.0"

__all__ = [
    "Client",
    "Component",
    "GradbankError",
    "RemoteLoss",
    "RemoteOptimizer",
    "aio",
    "component",
    "connect",
    "distances",
    "engine",
    "errors",
    "evaluation",
    "from_pml",
    "losses",
    "miners",
    "reducers",
    "regularizers",
    "samplers",
    "wrappers",
]
