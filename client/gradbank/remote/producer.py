"""One trainer of one session: it numbers the steps, and sends a step again until it is answered."""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, TypeVar

from torch import Tensor

from gradbank.errors import (
    GradbankError,
    InternalError,
    InvalidRequest,
    InvalidUpdate,
    LimitExceeded,
    ServerUnavailable,
    SessionNotFound,
    StepConflict,
)
from gradbank.remote.ticket import NO_NEWS, News, Ticket
from gradbank.remote.transport import Steps, Transport, answer_of
from gradbank.v1 import session_pb2, step_pb2
from gradbank.wire import WINDOW, TensorReader, error_of

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


T = TypeVar("T")


class _Doubt(NamedTuple):
    """A step that was sent and not answered, and the fingerprint of what was asked; None fits nothing."""

    ticket: Ticket
    asked: int | None


class Producer:
    """A rank of a session, attached under a nonce of its own.

    The server carries a step out once, however often it is sent: so one whose answer was lost is sent again, with the
    same number and bytes, until it is answered or time is up. Several may be in flight; they are answered in order, and
    whoever waits for an answer reads those before it.

    Args:
        transport: gives the transport, or raises if this process may not use it.
        incarnation: greater than that of any trainer that held the rank before.
        timeout: seconds that a step may take, all tries together.
    """

    def __init__(
        self,
        transport: Callable[[], Transport],
        session: str,
        rank: int,
        nonce: bytes,
        incarnation: int,
        timeout: float,
    ) -> None:
        self.session, self.rank, self.timeout = session, rank, timeout
        self._transport, self._nonce, self._incarnation = transport, nonce, incarnation
        self._renewed = b""
        self._steps: Steps | None = None
        self._changed = threading.Condition()  # and the lock of all of this, but while an answer is read
        self._reading = False
        self._flight: deque[Ticket] = deque()
        self._doubts: list[_Doubt] = []
        self.epoch = 0
        self.last_seq = 0
        self.max_step_bytes = 0

    def attach(self) -> None:
        """Becomes the session's producer of this rank; asking again changes nothing.

        Raises:
            Fenced: a newer trainer holds it.
            SessionNotFound: the session is gone.
        """
        self._attach(self._nonce, b"")

    def _attach(self, nonce: bytes, previous_nonce: bytes) -> None:
        request = session_pb2.AttachSessionRequest(
            session=self.session,
            rank=self.rank,
            incarnation=self._incarnation,
            nonce=nonce,
            previous_nonce=previous_nonce,
        )
        held = self._transport().call("AttachSession", request, self.timeout)
        if previous_nonce and held.epoch != self.epoch + 1:  # which is what a session that knows the nonce makes of it
            raise SessionNotFound(f"session {self.session!r} ended, and another has its name now: open it again")
        self.epoch, self.last_seq, self.max_step_bytes = held.epoch, held.last_seq, held.max_step_bytes

    def submit(self, step: step_pb2.StepInput, parts: list[memoryview], news: News) -> Ticket:
        """Sends a step, once there are fewer than `WINDOW` in flight; one that tells news, once there are none.

        Args:
            step: without session, rank, epoch, seq and weight events, which are filled in.
            parts: the bytes of its tensors.
            news: the weight events to send along.

        Raises:
            GradbankError: it was not sent.
        """
        transport = self._transport()  # before the lock, which a fork may have copied while it was held
        with self._changed:
            step.payload_bytes = sum(len(part) for part in parts)
            if step.payload_bytes > self.max_step_bytes:  # the server would say so too, once it has been sent
                raise LimitExceeded(
                    f"the step's tensors take {step.payload_bytes:,} bytes, and the server takes "
                    f"{self.max_step_bytes:,} a step; send smaller batches, or start it with a larger --max-step-bytes"
                )
            deadline = time.monotonic() + self.timeout
            most = 1 if news.events or self._doubts else WINDOW
            self._until(lambda: len(self._flight) < most, transport, deadline)
            if self._steps is not None and not self._steps.takes(step):
                self._until(lambda: not self._flight, transport, deadline)
            ticket = self._again(step, parts)
            if ticket is None:
                if self._doubts:
                    self._until(lambda: not self._flight, transport, deadline)
                    self._retried(lambda: self._settle_doubts(), deadline)
                ticket = Ticket(self._numbered(step, news), parts, news)
            if self._steps is None and not self._flight:
                with suppress(ServerUnavailable):
                    self._steps = transport.steps()
            self._flight.append(ticket)
            if self._steps is not None:  # else whoever waits for the answer sends it
                self._send(self._steps, ticket, deadline)
            return ticket

    def result(self, ticket: Ticket) -> tuple[step_pb2.StepOutput, Tensor]:
        """The answer of a step, and the bytes of its tensors; waits for it.

        Raises:
            GradbankError: the step was refused (the session is as it was), or could not be answered in time.
        """
        transport = self._transport()
        with self._changed:
            self._until(lambda: ticket.settled, transport, time.monotonic() + self.timeout)
        if ticket.error is not None:
            raise ticket.error
        assert ticket.outcome is not None  # it is settled
        return ticket.outcome

    def _until(self, holds: Callable[[], bool], transport: Transport, deadline: float) -> None:
        """Reads answers until a condition holds, or there are none to come. What goes wrong is in the tickets."""
        while not holds() and self._flight:
            if self._reading:  # another thread is
                self._changed.wait()
                continue
            self._reading = True
            try:
                self._read(transport, deadline)
            finally:
                self._reading = False
                self._changed.notify_all()

    def _read(self, transport: Transport, deadline: float) -> None:
        """Settles the oldest step in flight, or all of them if that fails."""
        renumbered = False
        try:
            oldest, output, data = self._retried(lambda: self._answer(transport, deadline), deadline)
            if not self._flight or self._flight[0] is not oldest:
                return  # the loss was closed meanwhile
            self._flight.popleft()
            if not output.HasField("error"):
                oldest.parts = []
                oldest.outcome, self.last_seq = (output, data), oldest.step.seq
                oldest.drop_news()
                if self._doubts:
                    del self._doubts[0]
                return
            oldest.error = error_of(output.error)
            if isinstance(oldest.error, InvalidUpdate):
                oldest.drop_news()  # sending them again would be refused again
            self._doubts = [_Doubt(doubt.ticket, None) for doubt in self._doubts[1:]]
            if isinstance(oldest.error, InternalError | StepConflict):  # its number may be used nonetheless
                again = isinstance(oldest.error, InternalError) and not self._flight  # else others may have it now
                self._doubts.insert(0, _Doubt(oldest, oldest.asks if again else None))
            oldest.parts = []
            renumbered = True
            self._renumber(deadline)
        except BaseException as error:
            self._give_up(error, renumbered)
            if not isinstance(error, GradbankError):
                raise

    def _answer(self, transport: Transport, deadline: float) -> tuple[Ticket, step_pb2.StepOutput, Tensor]:
        """The oldest step in flight and its answer, over the stream there is, or a new one that all are sent over."""
        if not self._flight:
            raise InvalidRequest("the loss was closed before the step was answered")
        oldest = self._flight[0]
        try:
            if self._steps is None:
                self._steps = transport.steps()
                for ticket in list(self._flight):
                    self._steps.send(ticket.step, ticket.parts, _left(deadline))
            steps = self._steps
            self._changed.release()
            try:
                return oldest, *answer_of(steps, oldest.step.seq, _left(deadline))
            finally:
                self._changed.acquire()
        except BaseException:  # Ctrl-C too: what is left on the stream is not the next step's answer
            self._drop()
            raise

    def _renumber(self, deadline: float) -> None:
        """Sends what is in flight again, for the number before theirs was not used: the server refuses them as sent."""
        steps = self._steps
        if steps is None:  # another thread found it broken, and the server may yet read what was sent over it
            raise ServerUnavailable("the stream of steps ended behind a step that was refused")
        for _ in self._flight:
            steps.receive(_left(deadline))
        for number, ticket in enumerate(self._flight):
            ticket.step.seq = self.last_seq + 1 + number
            steps.send(ticket.step, ticket.parts, _left(deadline))

    def _send(self, steps: Steps, ticket: Ticket, deadline: float) -> None:
        try:
            steps.send(ticket.step, ticket.parts, _left(deadline))
        except ServerUnavailable:
            self._drop()  # whoever waits for an answer opens another stream, and sends it over that
        except GradbankError:  # it was not sent
            self._flight.remove(ticket)
            self._drop()
            raise
        except BaseException as error:  # nobody knows
            self._give_up(error)
            raise

    def _give_up(self, error: BaseException, renumbered: bool = False) -> None:
        """Lets go of what is in flight, which is in doubt from now on: to be sent again as it was, but for what may
        have been sent under two numbers."""
        self._drop()
        told = (
            error if isinstance(error, GradbankError) else ServerUnavailable("the wait for its answer was interrupted")
        )
        for ticket in self._flight:
            ticket.error = told
        known = {id(doubt.ticket) for doubt in self._doubts}
        unknown = [ticket for ticket in self._flight if id(ticket) not in known]
        self._doubts += [_Doubt(ticket, None if renumbered else ticket.asks) for ticket in unknown]
        for ticket in self._flight:
            ticket.parts = []
        self._flight.clear()

    def _numbered(self, step: step_pb2.StepInput, news: News) -> step_pb2.StepInput:
        """The step as it will be sent."""
        numbered = step_pb2.StepInput()
        numbered.CopyFrom(step)
        numbered.session, numbered.rank, numbered.epoch = self.session, self.rank, self.epoch
        numbered.seq = self.last_seq + len(self._flight) + 1
        numbered.answered_seq = self.last_seq
        numbered.weight_events.extend(news.events)
        return numbered

    def _again(self, step: step_pb2.StepInput, parts: list[memoryview]) -> Ticket | None:
        """The oldest step in doubt, if it is asked for again: it must be sent as it was to be known for the same."""
        if not self._doubts or self._doubts[0].asked != Ticket(step, parts, NO_NEWS).asks:
            return None
        again = self._doubts[0].ticket
        again.parts, again.error = parts, None
        return again

    def _settle_doubts(self) -> None:
        """Finds out, for good, which of the steps that were never answered were carried out."""
        before = self.last_seq
        self._renewed = self._renewed or secrets.token_bytes(16)  # the same one, should this have to be asked again
        self._attach(self._renewed, self._nonce)
        self._nonce, self._renewed = self._renewed, b""
        for ticket, _ in self._doubts:
            if before < ticket.step.seq <= self.last_seq:
                ticket.drop_news()
        self._doubts = []

    def configure(self, optimizer: session_pb2.Optimizer) -> None:
        """Gives the session's weights an optimizer."""
        request = session_pb2.ConfigureOptimizerRequest(session=self.session, optimizer=optimizer)
        self._transport().call("ConfigureOptimizer", request, self.timeout)

    def pull(self) -> dict[str, Tensor]:
        """The session's state: weights and bank."""
        request = session_pb2.PullStateRequest(session=self.session)
        state, payload = self._transport().pull_state(request, self.timeout)
        reader = TensorReader(payload)
        return {named.name: reader.take(named.tensor).clone() for named in state}  # to be kept, each by itself

    def _retried(self, call: Callable[[], T], deadline: float) -> T:
        """What `call` gives, once the server can be reached."""
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return call()
            except ServerUnavailable as error:
                left = deadline - time.monotonic()
                time.sleep(max(min(pause, left), 0.0))
                if left <= pause:
                    raise ServerUnavailable(
                        f"session {self.session!r} could not be reached for {self.timeout:.3g} s: {error}. If the step "
                        "was carried out, the server still has the answer: calling again with the same batch is safe"
                    ) from None
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def close(self) -> None:
        with self._changed:
            if self._flight:
                self._give_up(ServerUnavailable("the loss was closed before the step was answered"))
            self._drop()

    def _drop(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.0)
