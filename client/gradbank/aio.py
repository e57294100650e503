"""The client for asyncio: the same calls, awaited.

    async with await gradbank.aio.connect("localhost:50051") as client:
        loss_fn = await client.open("run", losses.NTXentLoss())
        loss = await loss_fn(embeddings, labels)

Every call is that of `gradbank.Client`, in a thread beside the event loop, which goes on meanwhile.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

import gradbank.remote as sync
from gradbank.losses.loss import Loss
from gradbank.remote.hosted import L_co
from gradbank.remote.ladder import Via
from gradbank.remote.optimizer import RemoteOptimizer
from gradbank.remote.stats import ComponentInfo, ServerInfo, SessionInfo, SessionStats

T = TypeVar("T")
L = TypeVar("L", bound=Loss)


async def connect(address: str, timeout: float = 30.0, via: Via = "auto") -> "Client":
    """Connects to a server; see `gradbank.connect`."""
    return Client(await asyncio.to_thread(sync.connect, address, timeout, via))


class RemoteLoss(Generic[L_co]):
    """A loss hosted by a server, whose calls are awaited.

    Calls that are awaited together are carried out in the order in which they were made, up to four in flight.

    Attributes:
        remote: the `gradbank.RemoteLoss` whose calls these are.
    """

    def __init__(self, remote: sync.RemoteLoss[L_co]) -> None:
        self.remote = remote
        self._sending: ThreadPoolExecutor | None = None

    async def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a batch; see `gradbank.RemoteLoss`.

        A call that is cancelled may be carried out nonetheless. Its tensors may then be read until the next call is
        over: do not write to them before.
        """
        recorded = torch.is_grad_enabled()
        on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's
        stream = torch.cuda.current_stream() if on_gpu else None

        def sent() -> Callable[[], Tensor]:
            with torch.set_grad_enabled(recorded), torch.cuda.stream(stream):  # which are a thread's own
                if self.remote.learns:  # then each step tells of the ones before it
                    made: Tensor = self.remote(*args, **kwargs)
                    return lambda: made
                return self.remote.submit(*args, **kwargs).result

        return await asyncio.to_thread(await self._in_order(sent))

    async def _in_order(self, call: Callable[[], T]) -> T:
        """What `call` gives, in the one thread that keeps the order in which the calls of this loss were made."""
        self.remote.producer.transport()  # of which a forked child has none, and no thread either
        if self._sending is None:
            self._sending = ThreadPoolExecutor(1, thread_name_prefix="gradbank-aio")
        return await asyncio.get_running_loop().run_in_executor(self._sending, call)

    @property
    def name(self) -> str:
        return self.remote.name

    @property
    def created(self) -> bool:
        return self.remote.created

    @property
    def wire(self) -> torch.dtype | None:
        return self.remote.wire

    @property
    def timings(self) -> dict[str, float]:
        return self.remote.timings

    @property
    def hosted(self) -> L_co:
        return self.remote.hosted

    async def optimizer(self, name: str, **options: Any) -> RemoteOptimizer:
        return await asyncio.to_thread(partial(self.remote.optimizer, name, **options))

    async def reset_queue(self) -> None:
        await self._in_order(self.remote.reset_queue)

    async def add_to_memory(self, embeddings: Tensor, labels: Tensor) -> None:
        await self._in_order(partial(self.remote.add_to_memory, embeddings, labels))

    async def flush(self) -> None:
        await self._in_order(self.remote.flush)

    async def local(self) -> L_co:
        return await self._in_order(self.remote.local)

    async def close(self) -> None:
        sending, self._sending = self._sending, None
        await asyncio.to_thread(self.remote.close)
        if sending is not None:
            sending.shutdown(wait=False)


class Client:
    """A connection to one server; see `gradbank.Client`."""

    def __init__(self, client: sync.Client) -> None:
        self._client = client

    @property
    def address(self) -> str:
        return self._client.address

    @property
    def timeout(self) -> float:
        return self._client.timeout

    @property
    def via(self) -> str:
        """How steps go to the server: "local", "shm", "unix" or "tcp"."""
        return self._client.via

    async def open(self, name: str, loss: L, rank: int = 0, wire: torch.dtype | None = None) -> RemoteLoss[L]:
        return RemoteLoss(await asyncio.to_thread(self._client.open, name, loss, rank, wire))

    async def sessions(self) -> list[SessionInfo]:
        return await asyncio.to_thread(self._client.sessions)

    async def close_session(self, name: str) -> bool:
        return await asyncio.to_thread(self._client.close_session, name)

    async def stats(self, name: str) -> SessionStats:
        return await asyncio.to_thread(self._client.stats, name)

    async def watch(self, name: str, interval: float = 1.0) -> AsyncIterator[SessionStats]:
        seen, loop = await asyncio.to_thread(self._client.watch, name, interval), asyncio.get_running_loop()
        waiting = ThreadPoolExecutor(1, thread_name_prefix="gradbank-watch")  # which steps would wait for otherwise
        try:
            while (stats := await loop.run_in_executor(waiting, next, seen, None)) is not None:
                yield stats
        finally:
            seen.close()
            waiting.shutdown(wait=False)

    async def server(self) -> ServerInfo:
        return await asyncio.to_thread(self._client.server)

    async def catalog(self) -> list[ComponentInfo]:
        return await asyncio.to_thread(self._client.catalog)

    async def close(self) -> None:
        await asyncio.to_thread(self._client.close)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self._client.__exit__, kind)
