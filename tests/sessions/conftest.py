"""Sessions without a server: a clock that is set by hand, batches, and a trainer that numbers its steps."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from gradbank.losses.loss import Loss
from gradbank_server.build import build_loss
from gradbank_server.sessions import Answer, Batch, Limits, Session, Sessions
from gradbank_server.storage import MemoryStorage

DIMENSION = 8
HERE = torch.empty(0).device  # as --device has it


@dataclass
class HandClock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Trainer:
    """Steps one rank of a session, and counts as a real trainer would."""

    session: Session
    rank: int = 0
    incarnation: int = 1
    nonce: bytes = b"a"
    seq: int = field(init=False)
    epoch: int = field(init=False)

    def __post_init__(self) -> None:
        self.epoch, self.seq = self.session.attach(self.rank, self.incarnation, self.nonce)

    def send(self, seq: int, batch: Batch) -> tuple[Answer, bool]:
        return self.session.step(self.rank, self.epoch, seq, zlib.crc32(repr(batch).encode()), batch)[:2]

    def step(self, batch: Batch) -> Answer:
        answer, replayed = self.send(self.seq + 1, batch)
        assert not replayed
        self.seq += 1
        return answer


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage()


@pytest.fixture
def sessions(storage: MemoryStorage, clock: HandClock) -> Sessions:
    return Sessions(build_loss, HERE, Limits(sessions=4, session_bytes=2**20), storage, clock)


@pytest.fixture
def hosted(sessions: Sessions) -> Callable[..., Trainer]:
    """Creates a session from a loss, weights included, and attaches a trainer to it."""

    def create(loss: Loss, name: str = "run", **trainer: object) -> Trainer:
        weights = {key: value.detach() for key, value in loss.named_parameters()}
        return Trainer(sessions.create(name, loss.spec(), weights)[0], **trainer)

    return create


@pytest.fixture
def batch() -> Callable[..., Batch]:
    """The batch of a seed: the same each time."""

    def make(seed: int, rows: int = 6, **more: object) -> Batch:
        random = torch.Generator().manual_seed(seed)
        embeddings = torch.randn(rows, DIMENSION, generator=random)
        labels = torch.randint(0, 3, (rows,), generator=random)
        return Batch(**{"embeddings": embeddings, "labels": labels, "embeddings_need_gradient": True} | more)

    return make
