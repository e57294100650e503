"""One trainer of one session: it numbers the steps, and sends a step again until it is answered."""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from torch import Tensor

from gradbank.errors import (
    DeadlineExceeded,
    GradbankError,
    InvalidUpdate,
    LimitExceeded,
    ServerUnavailable,
    StepConflict,
)
from gradbank.protocol import WINDOW
from gradbank.remote.doubts import Doubts
from gradbank.remote.flight import Flight
from gradbank.remote.tenure import Tenure
from gradbank.remote.ticket import News, Ticket
from gradbank.remote.transport import Transport, left_until
from gradbank.v1 import session_pb2, step_pb2
from gradbank.wire import error_of

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_FREED_WITHIN_S = 1.0
_LOOKS_EVERY_S = 1.0  # who waits for another thread: Ctrl-C may come just before that tells the others
_CLOSED = "the loss was closed before the step was answered"
_INTERRUPTED = "the wait for its answer was interrupted; asking for the same batch again is safe"


T = TypeVar("T")


class Producer:
    """The steps of a trainer that holds a rank of a session.

    The server carries a step out once, however often it is sent: so one whose answer was lost is sent again, with the
    same number and bytes, until it is answered or time is up. Several may be in flight; they are answered in order, and
    whoever waits for an answer reads those before it.

    Whatever waits for the server is done by one thread at a time, which does not hold the lock; the others wait for it,
    and look again at what is to be done. Ctrl-C may come between any two lines: what is noted of an answer can be noted
    twice.

    Args:
        transport: gives the transport, or raises if this process may not use it.
        tenure: the rank, attached.
        timeout: seconds that a step may take, all tries together.
    """

    def __init__(self, transport: Callable[[], Transport], tenure: Tenure, timeout: float) -> None:
        self.transport, self.tenure, self.timeout = transport, tenure, timeout
        self._process = os.getpid()
        self._lock = threading.RLock()  # taken by itself: a Condition that is interrupted as it is taken stays taken
        self._changed = threading.Condition(self._lock)
        self._busy = False  # whether a thread waits for the server
        self._closed = 0  # how often, for it can be used again
        self._flight = Flight(self._lock)
        self._doubts = Doubts()

    def deadline(self, timeout: float | None = None) -> float:
        """When a call that begins now is to be over, as `time.monotonic` will say."""
        return time.monotonic() + (self.timeout if timeout is None else timeout)

    def submit(self, step: step_pb2.StepInput, parts: list[memoryview], news: News, deadline: float) -> Ticket:
        """Sends a step, once there are fewer than `WINDOW` in flight; one that tells news, once there are none.

        Args:
            step: without session, rank, epoch, seq and weight events, which are filled in.
            parts: the bytes of its tensors.
            news: the weight events to send along.

        Raises:
            GradbankError: it was not sent.
        """
        transport = self.transport()  # before the lock, which a fork may have copied while it was held
        step.payload_bytes = sum(len(part) for part in parts)
        if step.payload_bytes > self.tenure.max_step_bytes:  # the server would say so too, once it has been sent
            raise LimitExceeded(
                f"the step's tensors take {step.payload_bytes:,} bytes, and the server takes "
                f"{self.tenure.max_step_bytes:,} a step; send smaller batches, or start it with a larger "
                "--max-step-bytes"
            )
        while True:
            with self._lock:
                again = self._doubts.asked_again(step, parts, news)
                first = self._before(step, news, again is not None)
                if first is None:
                    ticket = Ticket(
                        self.tenure.numbered(step, len(self._flight), news) if again is None else again, parts, news
                    )
                    self._send(ticket, deadline)
                    return ticket
            self._alone(first, transport, deadline)

    def result(self, ticket: Ticket, deadline: float) -> tuple[step_pb2.StepOutput, Tensor]:
        """The answer of a step, and the bytes of its tensors; waits for it.

        Raises:
            GradbankError: the step was refused (the session is as it was), or could not be answered in time.
        """
        transport = self.transport()
        while not ticket.settled:
            with suppress(DeadlineExceeded):  # which is in the ticket, unless that was answered just then
                self._alone(self._read, transport, deadline)
            with self._lock:
                if not ticket.settled and not self._flight:  # interrupted twice, as the first one was seen to
                    ticket.error = ServerUnavailable(_INTERRUPTED)
        if ticket.error is not None:
            raise ticket.error.anew()
        assert ticket.outcome is not None  # it is settled
        return ticket.outcome

    def abandon(self, ticket: Ticket | None, error: BaseException) -> None:
        """Of a call that was interrupted nobody has the answer: should it be asked again, it is answered from store.

        Args:
            ticket: what `submit` gave; None if it did not come to that.
        """
        if isinstance(error, GradbankError):
            return
        with self._lock:
            self._give_up(error)
            if ticket is not None and ticket.outcome is not None and ticket.step.seq == self.tenure.last_seq:
                self._doubts.put_first(ticket)
                ticket.parts = []

    def _before(self, step: step_pb2.StepInput, news: News, again: bool) -> Callable[[Transport, float], None] | None:
        """What is to be done before a step can be sent."""
        if self._doubts and not again:
            return self._read if self._flight else self._settle_doubts
        if self.tenure.renewed and not self._flight:
            return self._begin_epoch
        most = 1 if news.events or self._doubts else WINDOW
        ready = len(self._flight) < most and self._flight.takes(step)
        if self._flight:
            return None if ready else self._read
        return None if ready and not self._busy else partial(self._connect, step)

    def _alone(self, work: Callable[[Transport, float], None], transport: Transport, deadline: float) -> None:
        """Does what waits for the server; or waits for a thread that does such, which may be all there was to do."""
        mine = False
        try:
            with self._lock:
                if self._busy:
                    told = self._changed.wait(min(left_until(deadline), _LOOKS_EVERY_S))
                    if not told and not left_until(deadline):
                        late = DeadlineExceeded(f"no step of session {self.tenure.session!r} was answered in time")
                        self._give_up(late)
                        raise late
                    return
                self._busy = mine = True
            work(transport, deadline)
        finally:
            if mine:
                self._busy = False
                with self._lock:
                    self._changed.notify_all()

    def _connect(self, step: step_pb2.StepInput, transport: Transport, deadline: float) -> None:
        if not self._flight:  # still
            self._retried(lambda: self._flight.connect(step, transport, deadline), deadline)

    def _read(self, transport: Transport, deadline: float) -> None:
        """Settles the oldest step in flight, or all of them if that fails. What goes wrong is in the tickets."""
        try:
            answer = self._retried(lambda: self._flight.answer(transport, deadline), deadline, places=True)
            with self._lock:
                if answer is None or self._flight.oldest is not answer[0]:
                    return  # the loss was closed meanwhile
                ticket, output, data = answer
                if not output.HasField("error"):
                    ticket.outcome = output, data
                    self._note(ticket)
                    self._flight.answered()
                    return
                self._flight.halt()
                self._refuse(ticket, error_of(output.error))
            try:
                self._flight.renumber(self.tenure.last_seq, deadline)
            except ServerUnavailable:
                self._renumber_anew(deadline)
        except BaseException as error:
            with self._lock:
                self._give_up(error)
            if not isinstance(error, GradbankError):
                raise

    def _renumber_anew(self, deadline: float) -> None:
        """Nobody knows whether the server has read what was sent behind a step that it refused: under a new epoch it
        carries out none of that, and all is sent again."""
        held = self._attached_anew(deadline)
        with self._lock:
            self._flight.drop()
            self._adopt(held, self._doubts)
            self._flight.number(self.tenure.last_seq, self.tenure.epoch)

    def _attached_anew(self, deadline: float) -> session_pb2.AttachSessionResponse:
        """A new epoch: nothing that was sent before can be carried out from now on."""
        held = self._retried(lambda: self.tenure.attached_anew(left_until(deadline)), deadline)
        self.tenure.check_renewed(held)
        return held

    def _adopt(self, held: session_pb2.AttachSessionResponse, doubts: Doubts) -> None:
        """Goes on from there: all at once, whenever Ctrl-C comes."""
        own = self.tenure
        own.max_step_bytes = held.max_step_bytes
        nonce, known = (own.renewed, b""), (held.epoch, held.last_seq)
        (own.epoch, own.last_seq), (own.nonce, own.renewed), self._doubts = known, nonce, doubts

    def _note(self, ticket: Ticket) -> None:
        """What is to be remembered of a step that was carried out."""
        self.tenure.last_seq = ticket.step.seq
        ticket.was_carried_out()
        self._doubts.remove(ticket)

    def _refuse(self, ticket: Ticket, error: GradbankError) -> None:
        """What is to be remembered of a step that was refused: the number of those behind it is another now."""
        ticket.error = error
        if isinstance(error, InvalidUpdate):
            ticket.drop_news()  # sending them again would be refused again
        self._doubts.renumber()
        if isinstance(error, StepConflict):  # its number may be used nonetheless
            self._doubts.put_first(ticket, fits=False)
        ticket.parts = []

    def _send(self, ticket: Ticket, deadline: float) -> None:
        try:
            self._flight.send(ticket, deadline)
        except GradbankError:
            raise
        except BaseException as error:  # nobody knows whether it was sent
            self._give_up(error)
            raise

    def _give_up(self, error: BaseException) -> None:
        """Lets go of what is in flight, which is in doubt from now on: to be sent again as it was, but for what may
        have been sent under two numbers."""
        told = error.anew() if isinstance(error, GradbankError) else ServerUnavailable(_INTERRUPTED)
        self._flight.drop()
        tickets = list(self._flight)
        for ticket in tickets:
            if ticket.outcome is not None:  # an interrupt came as it was noted
                self._note(ticket)
                continue
            ticket.error = told
            self._doubts.append(ticket, fits=not self._flight.halted)
        self._flight.clear()  # now, for an interrupt before it leaves them to the next who gives up
        for ticket in tickets:
            if ticket.error is not None:
                ticket.parts = []

    def _settle_doubts(self, transport: Transport, deadline: float) -> None:
        """Finds out, for good, which of the steps that were never answered were carried out."""
        if self._flight or not self._doubts:
            return  # another thread has found out, and gone on
        held = self._attached_anew(deadline)
        with self._lock:
            for ticket in self._doubts:
                if self.tenure.last_seq < ticket.step.seq <= held.last_seq:
                    ticket.was_carried_out()
            self._adopt(held, Doubts())

    def _begin_epoch(self, transport: Transport, deadline: float) -> None:
        """Goes on in the epoch that was asked for without an answer, which the server may be in. What is in doubt can
        be asked for again in that one too."""
        if self._flight or not self.tenure.renewed:
            return  # another thread has
        held = self._attached_anew(deadline)
        with self._lock:
            for ticket in self._doubts:
                ticket.step.epoch = held.epoch
            if self._doubts:  # which of them were carried out is found out as they are asked for
                held.last_seq = self.tenure.last_seq
            self._adopt(held, self._doubts)

    def _retried(self, call: Callable[[], T], deadline: float, places: bool = False) -> T:
        """What `call` gives, once the server can be reached.

        Args:
            places: whether a place for it may be that of what ended just now.
        """
        begun, pause, closed, broken = time.monotonic(), _FIRST_PAUSE_S, self._closed, False
        while True:
            self.transport()  # or the client was closed meanwhile
            try:
                return call()
            except (ServerUnavailable, LimitExceeded) as error:
                left, full = left_until(deadline), isinstance(error, LimitExceeded)
                # a stream has its place until the server sees that it ended, and one that broke until its step is
                # computed
                patience = left if broken else min(left, begun + _FREED_WITHIN_S - time.monotonic())
                if full and not (places and patience > pause):
                    raise
                broken = broken or not full
                with self._lock:
                    self._changed.wait(min(pause, left))  # which ends if the loss is closed
                if self._closed > closed:
                    raise ServerUnavailable(_CLOSED) from None
                if left <= pause:
                    waited = time.monotonic() - begun
                    raise ServerUnavailable(
                        f"session {self.tenure.session!r} did not answer for {waited:.3g} s: {error}. If the step was "
                        "carried out, the server still has the answer: calling again with the same batch is safe"
                    ) from None
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def close(self) -> None:
        if os.getpid() != self._process:  # a forked child's: the stream is its parent's, and the lock may be taken
            return
        with self._lock:
            self._closed += 1
            self._give_up(ServerUnavailable(_CLOSED))
            self._changed.notify_all()
