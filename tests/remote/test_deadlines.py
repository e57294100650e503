"""Whatever the server does, a call is over when its time is, and one that cannot be is refused at once."""

import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import losses
from gradbank.errors import DeadlineExceeded, GradbankError, InvalidRequest, ServerUnavailable
from gradbank.remote.channel import GrpcTransport
from gradbank.remote.ticket import NO_NEWS
from gradbank_server.service import Server
from gradbank_server.sessions import Session
from gradbank_server.settings import ServerSettings

from .conftest import DOWN, wait_until

D = 8


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, D, generator=generator).requires_grad_(), torch.arange(12) % 4


def seconds(call: Callable[[], object], *errors: type[Exception]) -> float:
    begun = time.monotonic()
    with pytest.raises(errors):
        call()
    return time.monotonic() - begun


def test_to_wait_for_a_place_and_to_settle_a_doubt_is_one_call(proxy: Any, name: str) -> None:
    with gradbank.connect(proxy.address, timeout=20) as client:
        there = client.open(name, losses.NTXentLoss())
        there(*batch(0))
        there.producer.timeout = 1
        proxy.lose(DOWN)
        waiting = [there.submit(*batch(seed)) for seed in range(1, 5)]
        assert 0.9 < seconds(lambda: there(*batch(5)), DeadlineExceeded, ServerUnavailable) < 1.7
        for future in waiting:
            assert seconds(future.result, DeadlineExceeded, ServerUnavailable) < 0.5
        there.producer.timeout = 20
        proxy.cut()
        assert there(*batch(5)).isfinite()


def test_a_connection_that_fell_silent_is_given_up_with_the_call(proxy: Any, name: str) -> None:
    with gradbank.connect(proxy.address, timeout=20) as client:
        here, there = losses.NTXentLoss(), client.open(name, losses.NTXentLoss())
        assert torch.equal(there(*batch(0)), here(*batch(0)))
        there.producer.timeout = 1
        proxy.lose(DOWN)  # of the connection there is, which stays open; a new one is well
        seconds(lambda: there(*batch(1)), DeadlineExceeded)
        there.producer.timeout = 10
        assert torch.equal(there(*batch(1)), here(*batch(1)))


def test_what_else_is_under_way_outlives_the_deadline_of_a_step(server: Server, name: str) -> None:
    with gradbank.connect(server.address, timeout=20, via="tcp") as client:
        slow, other = (client.open(f"{name}-{each}", losses.NTXentLoss()) for each in ("slow", "other"))
        for each in (slow, other):
            each(*batch(0))
        slow.producer.timeout = 1
        made: list[Any] = []
        with server.service.sessions[other.name]._turn:
            future = other.submit(*batch(1))
            threads = [threading.Thread(target=lambda: made.append(other.local()))]
            threads[0].start()
            with server.service.sessions[slow.name]._turn:
                seconds(lambda: slow(*batch(1)), DeadlineExceeded)
        threads[0].join()
        assert future.result().isfinite()
        assert len(made) == 1
        assert client.stats(other.name).replayed == 0


@pytest.mark.parametrize("step", range(6))
def test_ctrl_c_while_another_connection_is_taken_leaves_one_that_works(server: Server, name: str, step: int) -> None:
    """At each line of what takes it."""
    codes = {GrpcTransport._renew.__code__, GrpcTransport._go_on.__code__}
    with gradbank.connect(server.address, timeout=20, via="tcp") as client:
        there = client.open(name, losses.NTXentLoss())
        there(*batch(0))
        there.producer.timeout, lines = 1, iter(range(100))

        def trace(frame: Any, event: str, argument: Any) -> Any:
            if frame.f_code in codes and event == "line" and next(lines) == step:
                raise KeyboardInterrupt
            return trace if frame.f_code in codes or event == "call" else None

        with server.service.sessions[name]._turn:
            sys.settrace(trace)
            try:
                with pytest.raises((DeadlineExceeded, KeyboardInterrupt)):
                    there(*batch(1))
            finally:
                sys.settrace(None)
        there.producer.timeout = 10
        assert torch.equal(there(*batch(1)), losses.NTXentLoss()(*batch(1)))
        assert client.stats(name).steps == 2


@pytest.mark.parametrize("what", ["bringing it here", "opening it anew"])
def test_what_waits_for_the_last_step_first_is_one_call(server: Server, name: str, what: str) -> None:
    with gradbank.connect(server.address, timeout=20) as client:
        head = client.open(name, losses.ArcFaceLoss(4, D))
        optimizer = head.optimizer("SGD", lr=0.1)
        head(*batch(0)).backward()
        optimizer.step()
        head.producer.timeout = client.timeout = 1
        calls: dict[str, Callable[[], object]] = {
            "bringing it here": head.local,
            "opening it anew": lambda: client.open(name, losses.ArcFaceLoss(4, D)),
        }
        turn, over = server.service.sessions[name]._turn, threading.Event()
        carried_out = Session.step

        def slowly(self: Session, *arguments: Any) -> Any:  # and then nothing else is
            made = carried_out(self, *arguments)
            threading.Thread(target=lambda: [turn.acquire(), over.wait(10), turn.release()]).start()
            time.sleep(0.6)
            return made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Session, "step", slowly)
            assert 0.6 < seconds(calls[what], DeadlineExceeded) < 1.5
        over.set()


def test_opening_a_loss_anew_is_one_call(server: Server, name: str) -> None:
    with gradbank.connect(server.address, timeout=20) as client:
        head = client.open(name, losses.ArcFaceLoss(4, D))
        optimizer = head.optimizer("SGD", lr=0.1)
        head(*batch(0)).backward()
        optimizer.step()
        client.timeout = 1
        with server.service.sessions[name]._turn:
            assert 0.9 < seconds(lambda: client.open(name, losses.ArcFaceLoss(4, D)), DeadlineExceeded) < 1.8


def test_closing_a_client_of_many_optimizers_is_one_call(server: Server, name: str) -> None:
    client = gradbank.connect(server.address, timeout=20)
    with ExitStack() as held:
        for number in range(4):
            head = client.open(f"{name}-{number}", losses.ArcFaceLoss(4, D))
            optimizer = head.optimizer("SGD", lr=0.1)
            head(*batch(0)).backward()
            optimizer.step()
            head.producer.timeout = 1
            held.enter_context(server.service.sessions[head.name]._turn)
        client.timeout = 1
        assert 0.9 < seconds(client.close, DeadlineExceeded) < 2


def test_each_of_two_threads_that_wait_has_its_own_deadline(server: Server, name: str) -> None:
    with gradbank.connect(server.address, timeout=20) as client:
        there = client.open(name, losses.NTXentLoss())
        there(*batch(0))
        with server.service.sessions[name]._turn:  # so that none is answered
            first, second = there.submit(*batch(1)), there.submit(*batch(2))
            told: list[Exception] = []

            def wait() -> None:  # as long as any call may: 20 seconds
                try:
                    first.result()
                except GradbankError as error:
                    told.append(error)

            waiter = threading.Thread(target=wait)
            waiter.start()
            time.sleep(0.2)
            there.producer.timeout = 1
            assert 0.9 < seconds(second.result, DeadlineExceeded) < 1.7
            waiter.join(5)
            assert [type(error) for error in told] == [DeadlineExceeded]  # it cannot be answered before the first is
        there.producer.timeout = 20
        for seed in (1, 2, 3):
            there(*batch(seed))
        assert client.stats(name).steps == 4


def test_an_answer_that_another_thread_read_at_the_deadline_is_not_lost(
    server: Server, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gradbank.connect(server.address, timeout=20) as client:
        there = client.open(name, losses.NTXentLoss())
        there(*batch(0))
        producer, session = there.producer, server.service.sessions[name]
        call, wait = there._call(batch(1), {}), producer._changed.wait

        def late(timeout: float) -> bool:  # as if the notice had come just behind the deadline
            session._turn.release()
            assert wait(5)
            time.sleep(1.1)
            return False

        session._turn.acquire()
        ticket = producer.submit(call.step, call.payload, NO_NEWS, producer.deadline(1))
        reader = threading.Thread(target=producer.result, args=(ticket, producer.deadline()))
        reader.start()
        while not producer._busy:
            time.sleep(0.01)
        monkeypatch.setattr(producer._changed, "wait", late)
        output, _ = producer.result(ticket, producer.deadline(1))
        reader.join(5)
        assert output.seq == 2
        monkeypatch.undo()
        assert there(*batch(2)).isfinite()
        assert client.stats(name).steps == 3


def test_who_waits_for_another_thread_goes_on_though_nobody_says_so(server: Server, name: str) -> None:
    """As where Ctrl-C comes just before the other one would have."""
    with gradbank.connect(server.address, timeout=20) as client:
        there = client.open(name, losses.NTXentLoss())
        there(*batch(0))
        there.producer._busy = True
        waiter = threading.Thread(target=there, args=batch(1))
        waiter.start()
        time.sleep(0.2)
        assert waiter.is_alive()
        there.producer._busy = False
        waiter.join(5)
        assert not waiter.is_alive()
        assert client.stats(name).steps == 2


@pytest.mark.parametrize("way", ["shm", "tcp"])
def test_who_waits_for_answers_behind_a_refused_one_keeps_nobody(
    nearby: Server, name: str, monkeypatch: pytest.MonkeyPatch, way: Any
) -> None:
    with gradbank.connect(nearby.address, timeout=20, via=way) as client:
        there = client.open(name, losses.NTXentLoss())
        for future in [there.submit(*batch(seed)) for seed in range(3)]:  # from then on there is room for several
            future.result()
        refused = there.submit(torch.full((12, D), torch.nan), batch(0)[1])
        behind = there.submit(*batch(1))
        steps, waits, goes_on = there.producer._flight._steps, threading.Event(), threading.Event()
        receive, told = steps.receive, list[Exception]()  # type: ignore[union-attr]

        def late(timeout: float) -> Any:
            answer = receive(timeout)
            if not answer[0].error.message.startswith("embeddings"):  # those behind
                waits.set()
                goes_on.wait(10)
            return answer

        def ask() -> None:
            try:
                behind.result()
            except DeadlineExceeded as error:
                told.append(error)

        monkeypatch.setattr(steps, "receive", late)
        thread = threading.Thread(target=ask)
        thread.start()
        assert waits.wait(10)
        there.producer.timeout = 0.3
        assert seconds(lambda: there.submit(*batch(2)), DeadlineExceeded) < 2
        begun = time.monotonic()
        there.close()
        assert time.monotonic() - begun < 2
        goes_on.set()
        thread.join(20)
        with pytest.raises(GradbankError, match="not finite"):
            refused.result()
        assert len(told) == 1
        there.producer.timeout = 20
        assert there(*batch(3)).isfinite()


def test_closing_the_loss_ends_the_wait_of_who_connects(name: str) -> None:
    with (
        Server(ServerSettings(port=0, metrics_port=-1, drain_seconds=1)) as running,
        gradbank.connect(running.address, timeout=20) as client,
    ):
        there = client.open(name, losses.NTXentLoss())
        there(*batch(0))
    there.producer.transport = lambda: client._transport  # whose server is gone
    told = list[float]()
    thread = threading.Thread(target=lambda: told.append(seconds(lambda: there(*batch(1)), ServerUnavailable)))
    thread.start()
    wait_until(lambda: there.producer._busy)  # it connects
    there.close()
    thread.join(20)
    assert told[0] < 10


def test_a_client_that_was_closed_does_not_try(anyway: gradbank.Client, name: str) -> None:
    there = anyway.open(name, losses.NTXentLoss())
    there(*batch(0))
    anyway.close()
    for call in (lambda: there(*batch(1)), lambda: there.submit(*batch(1)), there.local, anyway.sessions):
        assert seconds(call, ServerUnavailable) < 1


@pytest.mark.parametrize("timeout", [math.inf, 1e12, 20])
def test_a_timeout_may_be_of_any_length(nearby: Server, name: str, timeout: float) -> None:
    for via in ("tcp", "unix", "shm"):
        with gradbank.connect(nearby.address, timeout, via) as client:  # type: ignore[arg-type]  # a str
            assert client.open(f"{name}-{via}", losses.NTXentLoss())(*batch(0)).isfinite()
            assert next(client.watch(f"{name}-{via}", 0.05)).steps == 1


@pytest.mark.parametrize("timeout", ["5", None, True, -math.inf])
def test_a_timeout_that_is_none_is_refused(timeout: Any) -> None:
    with pytest.raises(InvalidRequest, match="timeout must be above 0 seconds, got"):
        gradbank.connect("local://", timeout)


def test_a_future_that_failed_does_not_change_its_mind(proxy: Any, near: gradbank.Client, name: str) -> None:
    with gradbank.connect(proxy.address, timeout=20) as client:
        there, here = client.open(name, losses.NTXentLoss()), losses.NTXentLoss()
        there(*batch(0))
        there.producer.timeout = 1
        proxy.lose(DOWN)
        failed = there.submit(*batch(1))
        with pytest.raises(DeadlineExceeded):
            failed.result()
        there.producer.timeout = 20
        proxy.cut()
        assert torch.equal(there.submit(*batch(1)).result(), here(*batch(1)))
        with pytest.raises(DeadlineExceeded):
            failed.result()
        assert near.stats(name).steps == 2


def test_a_batch_asked_again_after_the_weights_were_stepped_is_of_the_new_ones(
    proxy: Any, near: gradbank.Client, name: str
) -> None:
    with gradbank.connect(proxy.address, timeout=20) as client:
        here = losses.ArcFaceLoss(4, D)
        there = client.open(name, here)
        far, own = there.optimizer("SGD", lr=0.5), torch.optim.SGD(here.parameters(), lr=0.5)
        made = {each: [each(*batch(seed)) for seed in (0, 1)] for each in (there, here)}
        for loss_fn, optimizer in ((there, far), (here, own)):
            made[loss_fn][0].backward()
            optimizer.step()
        there.producer.timeout = 1
        proxy.lose(DOWN)
        with pytest.raises(DeadlineExceeded):
            there(*batch(2))  # which tells of the optimizer's step, and is carried out
        there.producer.timeout = 20
        proxy.cut()
        for loss_fn, optimizer in ((there, far), (here, own)):
            optimizer.zero_grad()
            made[loss_fn][1].backward()
            optimizer.step()
        assert torch.equal(there(*batch(2)).detach(), here(*batch(2)).detach())
        assert near.stats(name).optimizer_steps == 2
        assert torch.equal(there.local().W, here.W)
