"""Trainers on an event loop."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.errors import NonFiniteError, ServerUnavailable, SessionNotFound
from gradbank_server.service import Server


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 16, generator=generator).requires_grad_(), torch.arange(12) % 4


def memory() -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(), 16, 50)


@pytest.mark.parametrize("via", ["tcp", "shm"])
def test_calls_awaited_together_are_carried_out_in_their_order(nearby: Server, name: str, via: str) -> None:
    async def train() -> list[tuple[torch.Tensor, torch.Tensor]]:
        async with await gradbank.aio.connect(nearby.address, 20, via) as client:  # type: ignore[arg-type]
            assert client.via == via
            loss_fn = await client.open(name, memory())
            leaves = [batch(seed) for seed in range(10)]
            values = await asyncio.gather(*(loss_fn(*each) for each in leaves))
            for value in values:
                value.backward()
            assert (await client.stats(name)).steps == 10
            return [(value, leaf.grad) for value, (leaf, _) in zip(values, leaves)]  # type: ignore[misc]

    here = memory()
    for seed, (value, gradient) in enumerate(asyncio.run(train())):
        leaf, labels = batch(seed)
        expected = here(leaf, labels)
        expected.backward()
        assert torch.equal(value, expected)
        assert torch.equal(gradient, leaf.grad)  # type: ignore[arg-type]


def test_the_event_loop_goes_on_while_a_step_is_under_way(nearby: Server, name: str) -> None:
    async def train() -> int:
        async with await gradbank.aio.connect(nearby.address) as client:
            loss_fn = await client.open(name, memory())
            turn = nearby.service.sessions[name]._turn
            ticks, over = 0, asyncio.Event()

            async def tick() -> None:
                nonlocal ticks
                while not over.is_set():
                    ticks += 1
                    await asyncio.sleep(0.01)

            ticking = asyncio.create_task(tick())
            await asyncio.sleep(0)

            def hold() -> None:
                with turn:
                    time.sleep(0.5)

            held = asyncio.create_task(asyncio.to_thread(hold))
            await asyncio.sleep(0.05)
            await loss_fn(*batch(0))
            over.set()
            await asyncio.gather(ticking, held)
            return ticks

    assert asyncio.run(train()) > 20


def test_errors_grad_modes_and_optimizers_are_those_of_the_client(nearby: Server, name: str) -> None:
    async def train() -> None:
        async with await gradbank.aio.connect(nearby.address) as client:
            loss_fn = await client.open(name, losses.ArcFaceLoss(4, 16))
            with pytest.raises(NonFiniteError):
                await loss_fn(torch.full((4, 16), torch.nan), torch.arange(4))
            with torch.no_grad():
                assert not (await loss_fn(*batch(0))).requires_grad
            optimizer = await loss_fn.optimizer("SGD", lr=0.1)
            before = (await loss_fn.local()).W.detach().clone()
            for seed in range(2):
                (await loss_fn(*batch(seed))).backward()
                optimizer.step()
                optimizer.zero_grad()
            await loss_fn.flush()
            assert not torch.equal((await loss_fn.local()).W, before)
            async for stats in client.watch(name, 0.05):
                assert stats.optimizer_steps == 2
                break
            assert name in [session.name for session in await client.sessions()]
            assert (await client.server()).version == gradbank.__version__
            assert any(info.name == "NTXentLoss" for info in await client.catalog())
            await loss_fn.close()
            assert await client.close_session(name)
            with pytest.raises(SessionNotFound):
                await client.stats(name)

    asyncio.run(train())


@pytest.mark.parametrize("address", ["nearby", "local"])
def test_a_watch_that_is_cancelled_ends(nearby: Server, name: str, address: str) -> None:
    async def watch() -> None:
        async with await gradbank.aio.connect(nearby.address if address == "nearby" else "local://") as client:
            await client.open(name, memory())
            seen: list[int] = []

            async def look() -> None:
                async for stats in client.watch(name, 30):
                    seen.append(stats.steps)

            looking = asyncio.create_task(look())
            while not seen:
                await asyncio.sleep(0.01)
            looking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await looking

    begun = time.monotonic()
    asyncio.run(watch())
    assert time.monotonic() - begun < 10  # the thread that waited for the next statistics does not go on to wait


def test_a_loss_that_was_closed_can_be_called_again(nearby: Server, name: str) -> None:
    async def train() -> None:
        async with await gradbank.aio.connect(nearby.address) as client:
            loss_fn = await client.open(name, memory())
            first = await loss_fn(*batch(0))
            await loss_fn.close()
            assert (await loss_fn(*batch(1))).isfinite()
        with pytest.raises(ServerUnavailable, match="was closed here: connect again"):
            await loss_fn(*batch(2))
        assert first.isfinite()

    asyncio.run(train())


def test_watching_takes_no_thread_from_steps(nearby: Server, name: str) -> None:
    """There are more watchers than threads that calls are made in."""

    async def train() -> float:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        async with await gradbank.aio.connect(nearby.address) as client:
            loss_fn = await client.open(name, losses.NTXentLoss())
            assert (loss_fn.name, loss_fn.created, loss_fn.wire) == (name, True, None)
            assert (client.address, client.timeout) == (nearby.address, 30)
            seen: list[int] = []

            async def look() -> None:
                async for stats in client.watch(name, 20):
                    seen.append(stats.steps)

            looking = [asyncio.create_task(look()) for _ in range(4)]
            while len(seen) < 4:
                await asyncio.sleep(0.01)
            loss = await asyncio.wait_for(loss_fn(*batch(0)), 10)
            assert loss_fn.timings["compute"] > 0
            for each in looking:
                each.cancel()
            await asyncio.gather(*looking, return_exceptions=True)
            return loss.item()

    embeddings, labels = batch(0)
    assert asyncio.run(train()) == losses.NTXentLoss()(embeddings, labels).item()


def test_a_closed_loss_keeps_no_thread(nearby: Server, name: str) -> None:
    async def train() -> None:
        async with await gradbank.aio.connect(nearby.address) as client:
            opened = [await client.open(f"{name}-{i}", losses.NTXentLoss()) for i in range(5)]
            for loss_fn in opened:
                await loss_fn(*batch(0))
                await loss_fn.close()
            until = time.monotonic() + 10
            while (held := sending()) and time.monotonic() < until:
                await asyncio.sleep(0.01)
            assert held == 0
            await opened[0](*batch(1))
            assert sending() == 1

    def sending() -> int:
        return sum(each.name.startswith("gradbank-aio") for each in threading.enumerate())

    asyncio.run(train())
