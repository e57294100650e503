"""Threads that share a loss: whoever waits reads for the others, whatever happens meanwhile."""

import itertools
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import losses
from gradbank.errors import NonFiniteError, ServerUnavailable
from gradbank.remote.future import StepFuture
from gradbank_server.service import service

from .conftest import DOWN, UP

pytestmark = pytest.mark.usefixtures("ahead")


def batch(seed: int, rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 16, generator=generator).requires_grad_(), torch.arange(rows) % 4


def in_threads(number: int, work: Callable[[int], None], meanwhile: Callable[[], None]) -> list[object]:
    """What went wrong as each of some threads did its work."""
    wrong: list[object] = []

    def guarded(thread: int) -> None:
        try:
            work(thread)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=guarded, args=(each,), daemon=True) for each in range(number)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        meanwhile()
    return wrong


def test_threads_share_a_loss_through_cuts(proxy: Any, far: gradbank.Client, near: gradbank.Client, name: str) -> None:
    """Whoever waits opens the connection again, for all."""
    there, here, where = far.open(name, losses.ContrastiveLoss()), losses.ContrastiveLoss(), random.Random(0)

    def train(thread: int) -> None:
        for seed in range(100 * thread, 100 * thread + 20, 2):
            future = there.submit(*batch(seed))
            made = {seed + 1: there(*batch(seed + 1)), seed: future.result()}
            assert all(torch.equal(loss, here(*batch(each))) for each, loss in made.items())

    def cut_at_times() -> None:
        proxy.cut_after(where.choice([UP, DOWN]), where.randrange(1, 9000))
        time.sleep(where.uniform(0.01, 0.1))

    assert in_threads(4, train, cut_at_times) == []
    proxy.spare()
    assert near.stats(name).steps == 80
    assert proxy.cuts >= 2


@pytest.mark.parametrize("via", ["tcp", "shm"])
def test_threads_share_a_loss_through_refusals_faults_and_closings(
    nearby: Any, name: str, monkeypatch: pytest.MonkeyPatch, via: Any
) -> None:
    """A step is answered with its own loss, refused by its own error, or told that the loss was closed."""
    real, made, where = service.answer_message, itertools.count(1), random.Random(0)

    def fails_at_times(*arguments: Any) -> Any:
        if next(made) % 17 == 0:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(service, "answer_message", fails_at_times)
    answered, closed = itertools.count(), itertools.count()
    with gradbank.connect(nearby.address, timeout=20, via=via) as client:
        there, here = client.open(name, losses.ContrastiveLoss()), losses.ContrastiveLoss()

        def finish(future: StepFuture, seed: int, rows: int, refused: bool) -> None:
            try:
                loss = future.result()
            except NonFiniteError:
                assert refused
            else:
                assert torch.equal(loss, here(*batch(seed, rows)))
                next(answered)

        def train(thread: int) -> None:
            chance = random.Random(thread)
            for seed in range(100 * thread, 100 * thread + 15):
                rows, refused = chance.choice([8, 12, 40, 300]), chance.random() < 0.2
                embeddings, labels = batch(seed, rows)
                try:
                    flight = [there.submit(embeddings * torch.nan if refused else embeddings, labels) for _ in "12"]
                    for future in flight:
                        finish(future, seed, rows, refused)
                except ServerUnavailable as error:
                    if "closed" not in str(error):
                        raise
                    next(closed)

        def close_at_times() -> None:
            time.sleep(where.uniform(0.02, 0.2))
            if where.random() < 0.3:
                there.close()

        assert in_threads(4, train, close_at_times) == []
        number, most_closed = next(answered), 2 * next(closed)
        assert number > 20
        assert number <= client.stats(name).steps <= number + most_closed
