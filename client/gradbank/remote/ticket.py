"""A step on its way: what was sent, what it told, and what came of it."""

import zlib
from typing import Protocol

from torch import Tensor

from gradbank.v1 import step_pb2


class News(Protocol):
    """What the server is to be told of the learnable weights with the next step."""

    events: list[step_pb2.WeightEvent]

    def drop(self, count: int) -> None:
        """Forgets the first `count` events: they were carried out, or never can be."""
        ...


class Ticket:
    """A step that was sent, and what came of it.

    Attributes:
        step: as it was sent.
        parts: the bytes of its tensors, which must stay as they are until it is answered.
        outcome: its answer, and the bytes of the answer's tensors; None until then.
        error: why there is none, and will not be.
    """

    def __init__(self, step: step_pb2.StepInput, parts: list[memoryview], news: News) -> None:
        self.step, self.parts, self._news = step, parts, news
        self.outcome: tuple[step_pb2.StepOutput, Tensor] | None = None
        self.error: Exception | None = None

    @property
    def settled(self) -> bool:
        return self.outcome is not None or self.error is not None

    def drop_news(self) -> None:
        """What it told was carried out, or never can be."""
        self._news.drop(len(self.step.weight_events))

    @property
    def asks(self) -> int:
        """A fingerprint of what is asked, whatever its number."""
        plain = step_pb2.StepInput()
        plain.CopyFrom(self.step)
        for field in ("session", "rank", "epoch", "seq", "weight_events", "answered_seq", "trainer_timings"):
            plain.ClearField(field)
        asked = zlib.crc32(plain.SerializeToString(deterministic=True))
        for part in self.parts:
            asked = zlib.crc32(part, asked)
        return asked


class _NoNews:
    """Of a loss without an optimizer there is nothing to tell."""

    events: list[step_pb2.WeightEvent] = []  # which nobody adds to

    def drop(self, count: int) -> None:
        pass


NO_NEWS = _NoNews()
