"""A step on its way: what was sent, what it told, and what came of it."""

import zlib
from typing import Protocol

from torch import Tensor

from gradbank.errors import GradbankError
from gradbank.v1 import step_pb2


class News(Protocol):
    """What the server is to be told of the learnable weights with the next step.

    Attributes:
        events: what it was not told yet, as far as is known.
        told: how many there were before these.
    """

    events: list[step_pb2.WeightEvent]
    told: int

    def drop(self, told: int) -> None:
        """Forgets all but what came after the first `told` events: they were carried out, or never can be."""
        ...

    def will_keep(self, seq: int) -> None:
        """Notes that the server keeps the weight gradient of step `seq`."""
        ...


class Ticket:
    """A step that was sent, and what came of it.

    Attributes:
        step: as it was sent.
        parts: the bytes of its tensors, which must stay as they are until it is answered.
        told: how many events the server has been told once it is carried out.
        outcome: its answer, and the bytes of the answer's tensors; None until then.
        error: why there is none, and will not be.
    """

    def __init__(self, step: step_pb2.StepInput, parts: list[memoryview], news: News) -> None:
        self.step, self.parts = step, parts
        self._news, self.told = news, news.told + len(step.weight_events)
        self.outcome: tuple[step_pb2.StepOutput, Tensor] | None = None
        self.error: GradbankError | None = None

    @property
    def settled(self) -> bool:
        return self.outcome is not None or self.error is not None

    def drop_news(self) -> None:
        """What it told never can be carried out, or was. Saying so twice is as once."""
        self._news.drop(self.told)

    def was_carried_out(self) -> None:
        """So it was, whether or not anybody has the answer. Saying so twice is as once."""
        self.drop_news()
        if self.step.weights_need_gradient:
            self._news.will_keep(self.step.seq)

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
    told = 0

    def drop(self, told: int) -> None:
        pass

    def will_keep(self, seq: int) -> None:
        pass


NO_NEWS = _NoNews()
