"""A connection that is used in a forked child: it is refused at once, and the parent goes on."""

import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.errors import ForkedClient
from gradbank_server.service import Server


def memory() -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(), 16, 100)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(8, 16, generator=made), torch.randint(0, 4, (8,), generator=made)


@pytest.fixture
def settled() -> Iterator[None]:
    """Keeps a child from collecting what earlier tests left of gRPC, whose locks it has in whatever state they were."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("settled")
def test_a_forked_child_is_told_and_the_parent_goes_on(near: gradbank.Client, name: str) -> None:
    there, here = near.open(name, memory()), memory()
    assert torch.equal(there(*batch()), here(*batch()))
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of any fork beside threads
        child = os.fork()
    if child == 0:
        for call in (lambda: there(*batch(1)), near.sessions, lambda: near.open("x", memory()), there.local):
            try:
                call()
            except ForkedClient as error:
                os.write(writer, f"{error}\n".encode())
        near.close()
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        lines = told.read().splitlines()
    assert os.waitpid(child, 0)[1] == 0
    assert len(lines) == 4
    assert all(f"was made in process {os.getpid()} and is used in its child {child}" in line for line in lines)
    assert torch.equal(there(*batch(1)), here(*batch(1)))


WORKERS = """
import sys, time, torch, gradbank
from torch.utils.data import DataLoader, Dataset
from gradbank import losses
from gradbank.errors import ForkedClient


class Careless(Dataset):
    def __init__(self, loss_fn):
        self.loss_fn = loss_fn

    def __len__(self):
        return 2

    def __getitem__(self, index):
        begun = time.monotonic()
        try:
            return str(self.loss_fn(*batch)), 0.0
        except ForkedClient as error:
            return str(error), time.monotonic() - begun


batch = torch.randn(8, 16), torch.arange(8) // 2
with gradbank.connect(sys.argv[1], timeout=20) as client:
    there, here = client.open(sys.argv[2], losses.NTXentLoss()), losses.NTXentLoss()
    assert torch.equal(there(*batch), here(*batch))
    came = list(DataLoader(Careless(there), batch_size=None, num_workers=1, multiprocessing_context="fork"))
    assert len(came) == 2
    for message, took in came:
        assert "call the loss in the main process, and not in a DataLoader worker" in message, message
        assert took < 10  # of the 20 s that a call may take
    assert client.stats(sys.argv[2]).steps == 1
    assert torch.equal(there(*batch), here(*batch))
"""


def test_a_loss_in_a_worker_of_a_data_loader_fails_at_once(server: Server, name: str) -> None:
    """In a process without a server, whose threads gRPC would not let a worker be forked beside."""
    words = [sys.executable, "-W", "ignore", "-c", WORKERS, server.address, name]
    done = subprocess.run(words, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


AWAITED_IN_A_CHILD = """
import asyncio, os, torch
from gradbank import aio, losses
from gradbank.errors import ForkedClient
batch = torch.randn(8, 4), torch.arange(8) // 2


async def opened():
    loss_fn = await (await aio.connect("local://")).open("a", losses.NTXentLoss())
    await loss_fn(*batch)
    return loss_fn


loss_fn = asyncio.run(opened())
child = os.fork()
if child == 0:
    refused = 0
    for call in (lambda: loss_fn(*batch), loss_fn.reset_queue, loss_fn.flush, loss_fn.local):
        try:
            asyncio.run(asyncio.wait_for(call(), 5))
        except ForkedClient:
            refused += 1
    os._exit(0 if refused == 4 else 1)
assert os.waitpid(child, 0)[1] == 0
"""


def test_what_is_awaited_in_a_forked_child_is_refused_at_once() -> None:
    words = [sys.executable, "-W", "ignore", "-c", AWAITED_IN_A_CHILD]
    done = subprocess.run(words, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
