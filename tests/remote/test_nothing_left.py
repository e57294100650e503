"""A refused step leaves nothing behind: neither side holds its batch until Python looks for what leads to itself."""

import asyncio
import gc
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import aio, losses
from gradbank.errors import GradbankError, InvalidRequest, NonFiniteError, SessionNotFound

ROWS = 1237  # as nothing else here has
Refused = Callable[[gradbank.Client, str, Tensor, Tensor], None]


@pytest.fixture(autouse=True)
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def held() -> int:
    """How many tensors of the batch there are, as it was sent, was taken in or was computed with."""
    return sum(issubclass(type(each), Tensor) and each.ndim == 2 and len(each) == ROWS for each in gc.get_objects())


def called(client: gradbank.Client, name: str, embeddings: Tensor, labels: Tensor) -> None:
    client.open(name, losses.NTXentLoss())(embeddings, labels)


def submitted(client: gradbank.Client, name: str, embeddings: Tensor, labels: Tensor) -> None:
    client.open(name, losses.NTXentLoss()).submit(embeddings, labels).result()


def closed(client: gradbank.Client, name: str, embeddings: Tensor, labels: Tensor) -> None:
    loss_fn = client.open(name, losses.NTXentLoss())
    client.close_session(name)
    loss_fn(embeddings, labels)


def awaited(client: gradbank.Client, name: str, embeddings: Tensor, labels: Tensor) -> None:
    told: list[str] = []

    async def call() -> None:
        async with await aio.connect(client.address, via="auto" if client.via == "local" else client.via) as there:
            loss_fn = await there.open(name, losses.NTXentLoss())
            try:
                await loss_fn(embeddings, labels)
            except NonFiniteError as error:
                told.append(str(error))

    asyncio.run(call())  # which holds an error that comes out of it
    raise NonFiniteError(*told)


def nan() -> tuple[Tensor, Tensor]:
    embeddings = torch.randn(ROWS, 8)
    embeddings[3, 3] = torch.nan
    return embeddings.requires_grad_(), torch.arange(ROWS) // 2


def unfit() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 8, requires_grad=True), torch.arange(ROWS - 1)


def fit() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 8, requires_grad=True), torch.arange(ROWS) // 2


@pytest.mark.parametrize(
    ("way", "batch", "kind"),
    [
        (called, nan, NonFiniteError),
        (called, unfit, InvalidRequest),
        (submitted, nan, NonFiniteError),
        (closed, fit, SessionNotFound),
        (awaited, nan, NonFiniteError),
    ],
)
def test_a_refused_batch_is_let_go_of(
    anyway: gradbank.Client,
    name: str,
    way: Refused,
    batch: Callable[[], tuple[Tensor, Tensor]],
    kind: type[GradbankError],
) -> None:
    assert held() == 0
    with pytest.raises(kind) as told:
        way(anyway, name, *batch())
    del told
    until = time.monotonic() + 10
    while held() and time.monotonic() < until:  # a thread of the server may be on its way out
        time.sleep(0.05)
    assert held() == 0
