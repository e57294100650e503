"""One trainer of one session: it numbers the steps, and sends a step again until it is answered."""

import secrets
import threading
import time
import zlib
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from gradbank.errors import DeadlineExceeded, GradbankError, InvalidUpdate, LimitExceeded, ServerUnavailable
from gradbank.remote.transport import Steps, Transport
from gradbank.v1 import session_pb2, step_pb2
from gradbank.wire import TensorReader, error_of

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


T = TypeVar("T")


class News(Protocol):
    """What the server is to be told of the learnable weights with the next step."""

    events: list[step_pb2.WeightEvent]

    def drop(self, count: int) -> None:
        """Forgets the first `count` events: they were carried out, or never can be."""
        ...


class _Sent(NamedTuple):
    """A step that was sent, with how many events, and (if it is in doubt) the fingerprint of what was asked."""

    step: step_pb2.StepInput
    events: int
    asked: int


class Producer:
    """A rank of a session, attached under a nonce of its own.

    The server carries a step out once, however often it is sent: so one whose answer was lost is sent again, with the
    same number and bytes, until it is answered or time is up.

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
        self._lock = threading.Lock()
        self._doubt: _Sent | None = None  # a step that was sent and not answered
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
        self.epoch, self.last_seq, self.max_step_bytes = held.epoch, held.last_seq, held.max_step_bytes

    def step(self, step: step_pb2.StepInput, parts: list[memoryview], news: News) -> tuple[step_pb2.StepOutput, Tensor]:
        """Has a step carried out: its answer, and the bytes of its tensors.

        Args:
            step: without session, rank, epoch, seq and weight events, which are filled in.
            parts: the bytes of its tensors.
            news: the weight events to send along.

        Raises:
            GradbankError: the step was refused (the session is as it was), or could not be answered in time.
        """
        transport = self._transport()  # before the lock, which a fork may have copied while it was held
        with self._lock:
            step.payload_bytes = sum(len(part) for part in parts)
            if step.payload_bytes > self.max_step_bytes:  # the server would say so too, once it has been sent
                raise LimitExceeded(
                    f"the step's tensors take {step.payload_bytes:,} bytes, and the server takes "
                    f"{self.max_step_bytes:,} a step; send smaller batches, or start it with a larger --max-step-bytes"
                )
            deadline = time.monotonic() + self.timeout
            sent = self._again(step, parts)
            if sent is None:
                self._retried(lambda: self._settle_doubt(news), deadline)
                sent = self._numbered(step, news)
            try:
                output, data = self._retried(lambda: self._exchanged(transport, sent.step, parts, deadline), deadline)
            except BaseException as error:
                if not isinstance(error, GradbankError) or isinstance(error, ServerUnavailable | DeadlineExceeded):
                    self._doubt = sent._replace(asked=_fingerprint(step, parts))
                raise
            self._doubt = None
            if output.HasField("error"):
                refused = error_of(output.error)
                if isinstance(refused, InvalidUpdate):
                    news.drop(sent.events)  # sending them again would be refused again
                raise refused
            self.last_seq = sent.step.seq
            news.drop(sent.events)
            return output, data

    def _numbered(self, step: step_pb2.StepInput, news: News) -> "_Sent":
        """The step as it will be sent."""
        numbered = step_pb2.StepInput()
        numbered.CopyFrom(step)
        numbered.session, numbered.rank, numbered.epoch = self.session, self.rank, self.epoch
        numbered.seq = self.last_seq + 1
        numbered.weight_events.extend(news.events)
        return _Sent(numbered, len(numbered.weight_events), 0)

    def _again(self, step: step_pb2.StepInput, parts: list[memoryview]) -> "_Sent | None":
        """The step that is in doubt, if it is asked for again: it must be sent as it was to be known for the same."""
        same = self._doubt is not None and self._doubt.asked == _fingerprint(step, parts)
        return self._doubt if same else None

    def _settle_doubt(self, news: News) -> None:
        """Finds out, for good, whether a step that was never answered was carried out."""
        if self._doubt is None:
            return
        before = self.last_seq
        self._renewed = self._renewed or secrets.token_bytes(16)  # the same one, should this have to be asked again
        self._attach(self._renewed, self._nonce)
        self._nonce, self._renewed = self._renewed, b""
        if self.last_seq > before:
            news.drop(self._doubt.events)
        self._doubt = None

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

    def _exchanged(
        self, transport: Transport, step: step_pb2.StepInput, parts: list[memoryview], deadline: float
    ) -> tuple[step_pb2.StepOutput, Tensor]:
        """Sends a step over the stream there is, or a new one, and waits for its answer."""
        try:
            if self._steps is None:
                self._steps = transport.steps()
            return self._steps.exchange(step, parts, max(deadline - time.monotonic(), 0.0))
        except BaseException:  # Ctrl-C too: what is left on the stream is not the next step's answer
            self._drop()
            raise

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
        self._drop()

    def _drop(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None


def _fingerprint(step: step_pb2.StepInput, parts: list[memoryview]) -> int:
    asked = zlib.crc32(step.SerializeToString(deterministic=True))
    for part in parts:
        asked = zlib.crc32(part, asked)
    return asked
