"""What a session has done, counted."""

import math
from dataclasses import dataclass, field

_MEMORY = 0.99  # of the running mean of the loss: about the last 100 steps


@dataclass
class Tally:
    """Counts and means since the session was created.

    Attributes:
        created: when, on the clock that the session was given; last_step: when a trainer last sent anything.
        steps: batches that were compared; what only tells of weights, enters rows or resets the queue is none.
        seconds: time spent, by phase, and in how many steps.
        statistics: what the loss and its parts wrote down of the last step.
    """

    created: float
    steps: int = 0
    replayed: int = 0
    rejected: int = 0
    optimizer_steps: int = 0
    last_loss: float = math.nan
    mean_loss: float = math.nan
    last_step: float = math.nan
    received_bytes: int = 0
    sent_bytes: int = 0
    seconds: dict[str, tuple[float, int]] = field(default_factory=dict)
    statistics: dict[str, float] = field(default_factory=dict)

    def stepped(self, loss: float | None, statistics: dict[str, float], now: float) -> None:
        """Counts a step, whose loss is None if it had no batch."""
        self.last_step = now
        if loss is not None:
            self.steps += 1
            self.last_loss, self.statistics = loss, statistics
            self.mean_loss = loss if math.isnan(self.mean_loss) else loss + _MEMORY * (self.mean_loss - loss)

    def timed(self, seconds: dict[str, float], received: int, sent: int) -> None:
        self.received_bytes += received
        self.sent_bytes += sent
        for phase, spent in seconds.items():
            total, steps = self.seconds.get(phase, (0.0, 0))
            self.seconds[phase] = total + spent, steps + 1

    def mean_seconds(self, phase: str) -> float:
        total, steps = self.seconds.get(phase, (0.0, 0))
        return total / max(steps, 1)
