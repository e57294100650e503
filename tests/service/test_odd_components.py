"""Components and settings that no server should be hurt by: each is answered, and the next step is well."""

import inspect
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import distances, losses, miners, reducers
from gradbank.component import component
from gradbank.errors import InternalError, InvalidComponent, InvalidRequest, InvalidUpdate, LimitExceeded
from gradbank_server.logs import configure
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings

D = 4
ODD: dict[str, Callable[[Tensor], Any]] = {
    "whole": lambda loss: torch.tensor(3, dtype=torch.int16),
    "vector": lambda loss: loss.expand(2),
    "exits": lambda loss: exit(3),
    "interrupted": lambda loss: raises(KeyboardInterrupt()),
    "cancelled": lambda loss: raises(GeneratorExit()),
    "half": lambda loss: loss.to(torch.bfloat16),
}


def raises(error: BaseException) -> None:
    raise error


@component
class OddLoss(losses.Loss):
    """Is odd where the first label is 1."""

    how: str = "whole"

    def forward(self, embeddings: Tensor, labels: Tensor) -> Any:
        loss = embeddings.square().mean()
        return ODD[self.how](loss) if int(labels[0]) else loss


@component
class ExitsElsewhere(losses.Loss):
    """Is built by trainers alone."""

    def __post_init__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise SystemExit(3)


@component
class AnyLoss(losses.Loss):
    """The mean square and the first label."""

    def forward(self, embeddings: Tensor, **more: Any) -> Tensor:
        return embeddings.square().mean() + more["labels"][0]


def batch(odd: bool = False) -> tuple[Tensor, Tensor]:
    return torch.ones(6, D).requires_grad_(), torch.full((6,), int(odd))


@pytest.mark.parametrize(
    ("how", "error", "told"),
    [
        ("whole", InvalidRequest, r"gives one number, of torch.float32 .* gives torch.int16 of shape \(\)"),
        ("vector", InvalidRequest, r"gives torch.float32 of shape \(2,\)"),
        ("exits", InternalError, "the server failed"),
        ("interrupted", InternalError, "the server failed"),
        ("cancelled", InternalError, "the server failed"),
    ],
)
@pytest.mark.parametrize("via", ["tcp", "shm"])
def test_a_loss_that_gives_no_number_is_answered_and_nothing_is_changed(
    nearby: Server, name: str, how: str, error: type[Exception], told: str, via: Any
) -> None:
    with gradbank.connect(nearby.address, timeout=20, via=via) as client:
        there = client.open(name, OddLoss(how))
        for _ in range(2):
            with pytest.raises(error, match=told):
                there(*batch(odd=True))
            assert there(*batch()).item() == 1
        assert client.stats(name).steps == 2


def test_a_loss_of_half_precision_comes_as_it_is(nearby: Server, name: str) -> None:
    with gradbank.connect(nearby.address, timeout=20) as client:
        made = client.open(name, OddLoss("half"))(*batch(odd=True))
    assert (made.dtype, made.item()) == (torch.bfloat16, 1)


def test_an_interrupt_of_the_trainer_is_his_where_the_server_is_in_his_process(name: str) -> None:
    with gradbank.connect("local://") as client, pytest.raises(KeyboardInterrupt):
        client.open(name, OddLoss("interrupted"))(*batch(odd=True))


@pytest.mark.parametrize(
    ("optimizer", "made", "then"),
    [
        ("Adam", {}, {"betas": (1.0, 0.999)}),  # torch divides by zero
        ("RAdam", {}, {"betas": (0.9, 1.0)}),
        ("Adam", {"capturable": True}, {}),  # and asserts
    ],
)
def test_an_optimizer_that_fails_in_any_way_keeps_nobody_from_the_next_step(
    client: gradbank.Client, name: str, optimizer: str, made: dict[str, Any], then: dict[str, Any]
) -> None:
    there = client.open(name, losses.ArcFaceLoss(2, D))
    steps = there.optimizer(optimizer, lr=0.1, **made)
    embeddings, labels = torch.randn(6, D), torch.arange(6) % 2
    if made and embeddings.is_cuda:
        pytest.skip("a GPU captures")
    before = dict(steps.param_groups[0])
    refused = 0
    for step in range(4):
        steps.param_groups[0].update(then if step == 1 else {name: before[name] for name in then})
        try:
            there(embeddings, labels).backward()
        except InvalidUpdate:
            refused += 1
            there(embeddings, labels).backward()
        if step < 3:
            steps.step()
    assert refused == (3 if made else 1)
    assert client.stats(name).steps == 4


def test_what_a_hosted_loss_does_not_take_is_refused_by_name(
    server: Server, client: gradbank.Client, name: str
) -> None:
    there = client.open(name, losses.NPairLoss())
    session = server.service.sessions[name]
    there._signature = inspect.signature(losses.NTXentLoss().forward)  # as one in another language does not look first
    with pytest.raises(InvalidRequest, match="NPairLoss takes no ref_"):
        there(torch.randn(4, D), torch.arange(4) // 2, None, torch.randn(4, D), torch.arange(4) // 2)
    assert session.tally.steps == 0


def test_a_constructor_that_exits_is_refused(client: gradbank.Client, name: str) -> None:
    with pytest.raises(InvalidComponent, match="ExitsElsewhere cannot be built: SystemExit: 3"):
        client.open(name, ExitsElsewhere())
    assert client.open(name, losses.NTXentLoss()).created


def test_a_loss_that_takes_any_argument_gets_those_that_are_sent(client: gradbank.Client, name: str) -> None:
    there = client.open(name, AnyLoss())
    there._signature = inspect.signature(losses.NTXentLoss().forward)  # as above
    assert there(torch.ones(6, D), torch.full((6,), 2)).item() == 3


def test_all_banks_of_a_session_count_towards_its_limit_and_its_statistics(name: str) -> None:
    settings = ServerSettings(port=0, metrics_port=-1, max_session_bytes=4000)
    with Server(settings) as small, gradbank.connect(small.address, timeout=10) as client:
        both = losses.MultipleLosses([losses.CrossBatchMemory(losses.NTXentLoss(), D, 100) for _ in "12"])
        with pytest.raises(LimitExceeded, match="takes 0 bytes of weights and 4,800 of banks with their labels"):
            client.open(name, both)
        there = client.open(name, losses.MultipleLosses([losses.CrossBatchMemory(losses.NTXentLoss(), D, 60)]))
        there(torch.randn(6, D), torch.arange(6) % 2)
        told = client.stats(name)
        assert (told.bank_rows, told.bank_capacity) == (6, 60)
        assert told.bank_bytes > 0


def test_weights_of_a_wider_dtype_count_as_they_are(name: str) -> None:
    settings = ServerSettings(port=0, metrics_port=-1, max_session_bytes=1000)
    with Server(settings) as small, gradbank.connect(small.address, timeout=10) as client:
        queue = losses.CrossBatchMemory(losses.NTXentLoss(), 8, 10)
        with pytest.raises(LimitExceeded, match="takes 768 bytes of weights and 400 of banks"):
            client.open(name, losses.MultipleLosses([queue, losses.ArcFaceLoss(12, 8).double()]))
        assert client.open(name, losses.MultipleLosses([queue, losses.ArcFaceLoss(12, 8)])).created


@pytest.mark.parametrize("inner", [distances.LpDistance(), miners.BatchHardMiner(), reducers.MeanReducer()], ids=repr)
def test_what_is_no_loss_is_refused_before_it_is_hosted(client: gradbank.Client, name: str, inner: Any) -> None:
    both = losses.MultipleLosses([losses.NTXentLoss(), losses.NTXentLoss()])
    both.losses = [losses.NTXentLoss(), inner]
    with pytest.raises(InvalidComponent, match=f"losses must each be a Loss, got {type(inner).__name__}"):
        client.open(name, both)


class Broken:
    """Where nothing can be written."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        raise BrokenPipeError

    def isatty(self) -> bool:
        return False


@pytest.fixture
def logs_nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import structlog

    kept = structlog.get_config()
    monkeypatch.setattr("sys.stderr", Broken())
    configure("json", "info")
    yield
    structlog.configure(**kept)


@pytest.mark.usefixtures("logs_nowhere")
def test_a_log_that_cannot_be_written_changes_nothing(name: str) -> None:
    with Server(ServerSettings(port=0, metrics_port=-1)) as running, gradbank.connect(running.address) as client:
        there = client.open(name, losses.NTXentLoss())
        assert there(torch.randn(6, D), torch.arange(6) % 2).isfinite()
        assert client.close_session(name)


def test_to_drain_may_take_for_ever_and_waits_for_a_session_that_is_being_closed(name: str) -> None:
    running = Server(ServerSettings(port=0, metrics_port=-1, drain_seconds=float("inf")))
    running.start()
    with gradbank.connect(running.address, timeout=20) as client:
        client.open(name, losses.NTXentLoss())
    until = threading.Event()
    thread = threading.Thread(target=lambda: running._computing.run(lambda: until.wait(20)))  # of no session any more
    thread.start()
    while not running.computes:
        time.sleep(0.01)
    threading.Timer(1.0, until.set).start()
    begun = time.monotonic()
    running.stop()
    assert time.monotonic() - begun >= 0.9
    assert not running.computes


@pytest.mark.parametrize("settings", [{"device": "meta"}, {"device": "mps"}, {"max_step_bytes": 10**30}])
def test_what_no_step_could_be_computed_with_does_not_start(settings: dict[str, Any]) -> None:
    with pytest.raises((InvalidRequest, ValueError), match=r"--device must be|less than or equal"):
        Server(ServerSettings(port=0, metrics_port=-1, **settings))
