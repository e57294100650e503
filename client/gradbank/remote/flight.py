"""The steps of a trainer that were sent and are not answered, and the stream that they were sent over."""

import threading
from collections import deque
from collections.abc import Iterator

from torch import Tensor

from gradbank.errors import GradbankError, InternalError, ServerUnavailable
from gradbank.remote.ticket import Ticket
from gradbank.remote.transport import Steps, Transport, answer_of, left_until
from gradbank.v1 import step_pb2


class Flight:
    """Steps in the order of their numbers, the oldest first.

    All of it is for who holds the lock, but for `connect`, `answer` and `renumber`: these wait for the server, and are
    for one thread at a time, which does not hold it.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._tickets: deque[Ticket] = deque()
        self._steps: Steps | None = None
        self.halted = False  # whether those in flight are to be sent again, before any other

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._tickets)

    @property
    def oldest(self) -> Ticket | None:
        return self._tickets[0] if self._tickets else None

    def takes(self, step: step_pb2.StepInput) -> bool:
        """Whether this step can be sent now, without a wait for the server."""
        if self.halted:
            return False
        if self._steps is None:
            return bool(self._tickets)  # a thread that waits for those makes a stream, and sends all there is
        return self._steps.takes(step)

    def connect(self, step: step_pb2.StepInput, transport: Transport, deadline: float) -> None:
        """Has a stream take a step, while nothing is in flight."""
        steps = self._steps
        try:
            if steps is None:
                steps = transport.steps(left_until(deadline))
                with self._lock:
                    self._steps = steps
            steps.prepare(step, left_until(deadline))
        except BaseException:
            if steps is not None:  # which may be nobody's yet
                steps.close()
            with self._lock:
                self.drop()
            raise

    def send(self, ticket: Ticket, deadline: float) -> None:
        """Sends a step. Over a stream that is broken, whoever waits for its answer sends it again.

        Raises:
            GradbankError: it was not sent, and is not in flight.
        """
        self._tickets.append(ticket)
        if self._steps is None:  # a thread is making it
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
                if not self._all_sent(steps, oldest, deadline):
                    steps.close()
                    return None
            output, data = answer_of(steps, oldest.step.seq, left_until(deadline))
            if output.carried_out:  # and its answer is lost, as if the stream had ended before it
                raise ServerUnavailable(output.error.message)
            return oldest, output, data
        except BaseException:  # Ctrl-C too: what is left on the stream is not the next step's answer
            if steps is not None:  # which may be nobody's yet
                steps.close()
            with self._lock:
                self.drop()
            raise

    def _all_sent(self, steps: Steps, oldest: Ticket, deadline: float) -> bool:
        """Sends what is in flight over a stream that nobody has yet, and lets all have it; not if another thread let go
        of the oldest."""
        sent = 0
        while True:
            with self._lock:
                if self.oldest is not oldest:
                    return False
                left = [(ticket.step, ticket.parts) for ticket in self._tickets][sent:]
                if not left:
                    self._steps = steps
                    return True
            for step, parts in left:
                steps.send(step, parts, left_until(deadline))
            sent += len(left)

    def answered(self) -> None:
        """The oldest step was: it is not in flight any more."""
        self._tickets.popleft()

    def halt(self) -> None:
        """The oldest step was refused: the server refuses those behind it too, under the numbers that they have."""
        self.halted = True  # until `renumber` is done, or they are let go of
        self.answered()

    def renumber(self, last: int, deadline: float) -> None:
        """Sends all again, under the numbers after `last`, once the server has refused them."""
        with self._lock:
            steps, behind = self._steps, list(self._tickets)
            if not behind:
                self.halted = False
                return
        if steps is None:  # another thread found it broken, and the server may yet read what was sent over it
            raise ServerUnavailable("the stream of steps ended behind a step that was refused")
        for ticket in behind:
            if not answer_of(steps, ticket.step.seq, left_until(deadline))[0].HasField("error"):
                raise InternalError(f"the server carried out step {ticket.step.seq}, and refused the one before it")
        with self._lock:
            self.number(last)
            try:
                for ticket in self._tickets:
                    steps.send(ticket.step, ticket.parts, left_until(deadline))
            except ServerUnavailable:
                self.drop()  # whoever waits for their answers sends them again

    def number(self, last: int, epoch: int | None = None) -> None:
        """Gives all the numbers after `last`, and perhaps a new epoch; nothing that was sent can be carried out."""
        for number, ticket in enumerate(self._tickets, last + 1):
            ticket.step.seq = number
            if epoch is not None:
                ticket.step.epoch = epoch
        self.halted = False

    def clear(self) -> None:
        """Lets go of the steps in flight."""
        self._tickets, self.halted = deque(), False

    def drop(self) -> None:
        """Ends the stream: nobody knows which of the steps in flight are carried out."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None
