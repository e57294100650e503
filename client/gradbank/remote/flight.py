"""The steps of a trainer that were sent and are not answered, and the stream that they were sent over."""

import threading
from collections import deque
from collections.abc import Iterator

from torch import Tensor

from gradbank.errors import GradbankError, ServerUnavailable
from gradbank.remote.ticket import Ticket
from gradbank.remote.transport import Steps, Transport, answer_of, left_until
from gradbank.v1 import step_pb2


class Flight:
    """Steps in the order of their numbers, the oldest first.

    All of it is for who holds the lock, but for `connect` and `answer`: these wait for the server, and are for one
    thread at a time, which does not hold it.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._tickets: deque[Ticket] = deque()
        self._steps: Steps | None = None

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._tickets)

    @property
    def oldest(self) -> Ticket | None:
        return self._tickets[0] if self._tickets else None

    @property
    def connected(self) -> bool:
        return self._steps is not None

    def takes(self, step: step_pb2.StepInput) -> bool:
        """Whether this step can be sent before those in flight are answered."""
        return self._steps is None or self._steps.takes(step)

    def connect(self, transport: Transport, deadline: float) -> None:
        """Opens a stream, while there is none and nothing in flight."""
        made = transport.steps(left_until(deadline))
        with self._lock:
            self._steps = made

    def send(self, ticket: Ticket, deadline: float) -> None:
        """Sends a step. Over a stream that is broken, whoever waits for its answer sends it again.

        Raises:
            GradbankError: it was not sent, and is not in flight.
        """
        self._tickets.append(ticket)
        if self._steps is None:  # a thread is making it, and sends all there is
            return
        try:
            self._steps.send(ticket.step, ticket.parts, left_until(deadline))
        except ServerUnavailable:
            self.drop()
        except GradbankError:
            self._tickets.remove(ticket)
            self.drop()
            raise

    def answer(self, transport: Transport, deadline: float) -> tuple[Ticket, step_pb2.StepOutput, Tensor] | None:
        """The oldest step and its answer, over the stream there is, or over a new one that all are sent over; None if
        another thread let go of it."""
        with self._lock:
            oldest, steps = self.oldest, self._steps
        if oldest is None:
            return None
        try:
            if steps is None:
                steps = transport.steps(left_until(deadline))
                with self._lock:
                    if self.oldest is not oldest:
                        steps.close()
                        return None
                    self._steps = steps
                    for ticket in self._tickets:
                        steps.send(ticket.step, ticket.parts, left_until(deadline))
            return oldest, *answer_of(steps, oldest.step.seq, left_until(deadline))
        except BaseException:  # Ctrl-C too: what is left on the stream is not the next step's answer
            with self._lock:
                self.drop()
            raise

    def answered(self) -> None:
        """The oldest step was: it is not in flight any more."""
        self._tickets.popleft()

    def renumber(self, first: int, deadline: float) -> None:
        """Sends all again under numbers from `first` on, for the server refuses them under those that they have."""
        steps = self._steps
        if steps is None:  # another thread found it broken, and the server may yet read what was sent over it
            raise ServerUnavailable("the stream of steps ended behind a step that was refused")
        for _ in self._tickets:
            steps.receive(left_until(deadline))
        for number, ticket in enumerate(self._tickets, first):
            ticket.step.seq = number
            steps.send(ticket.step, ticket.parts, left_until(deadline))

    def clear(self) -> None:
        """Lets go of the steps in flight."""
        self._tickets = deque()

    def drop(self) -> None:
        """Ends the stream: nobody knows which of the steps in flight are carried out."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None
