"""One trainer of one session: it numbers the steps, and sends a step again until it is answered."""

import threading
import time
import zlib
from collections.abc import Callable, Iterable

from torch import Tensor

from gradbank.errors import GradbankError, LimitExceeded, ServerUnavailable
from gradbank.remote.transport import Steps, Transport
from gradbank.v1 import session_pb2, step_pb2
from gradbank.wire import TensorReader, error_of

STATE_TIMEOUT_S = 300.0  # weights and banks are large
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


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
        self._steps: Steps | None = None
        self._lock = threading.Lock()
        self._doubt: tuple[int, Callable[[], None]] | None = None  # a step that was sent and not answered
        self.epoch = 0
        self.last_seq = 0
        self.max_step_bytes = 0

    def attach(self) -> None:
        """Becomes the session's producer of this rank; asking again changes nothing.

        Raises:
            Fenced: a newer trainer holds it.
            SessionNotFound: the session is gone.
        """
        request = session_pb2.AttachSessionRequest(
            session=self.session, rank=self.rank, incarnation=self._incarnation, nonce=self._nonce
        )
        held = self._transport().call("AttachSession", request, self.timeout)
        self.epoch, self.last_seq, self.max_step_bytes = held.epoch, held.last_seq, held.max_step_bytes

    def step(
        self, step: step_pb2.StepInput, payload: Iterable[memoryview], carried_out: Callable[[], None]
    ) -> tuple[step_pb2.StepOutput, bytes]:
        """Has a step carried out: its answer, and the bytes of its tensors. `session`, `rank`, `epoch` and `seq` are
        filled in.

        Args:
            carried_out: called once it is known that the step was, which may be when the next one is sent.

        Raises:
            GradbankError: the step was refused (the session is as it was), or could not be answered in time.
        """
        parts = list(payload)
        with self._lock:
            transport = self._transport()
            step.payload_bytes = sum(len(part) for part in parts)
            if step.payload_bytes > self.max_step_bytes:  # the server would say so too, once it has been sent
                raise LimitExceeded(
                    f"the step's tensors take {step.payload_bytes:,} bytes, and the server takes "
                    f"{self.max_step_bytes:,} a step; send smaller batches, or start it with a larger --max-step-bytes"
                )
            asked = zlib.crc32(step.SerializeToString(deterministic=True))
            for part in parts:
                asked = zlib.crc32(part, asked)
            self._settle_doubt(asked)
            step.session, step.rank, step.epoch, step.seq = self.session, self.rank, self.epoch, self.last_seq + 1
            self._doubt = (asked, carried_out)
            output, data = self._sent(transport, step, parts)
            self._doubt = None
            if output.HasField("error"):
                raise error_of(output.error)
            self.last_seq = step.seq
            carried_out()
            return output, data

    def configure(self, optimizer: session_pb2.Optimizer) -> None:
        """Gives the session's weights an optimizer."""
        request = session_pb2.ConfigureOptimizerRequest(session=self.session, optimizer=optimizer)
        self._transport().call("ConfigureOptimizer", request, self.timeout)

    def pull(self) -> dict[str, Tensor]:
        """The session's state: weights and bank."""
        request = session_pb2.PullStateRequest(session=self.session)
        state, payload = self._transport().pull_state(request, STATE_TIMEOUT_S)
        reader = TensorReader(payload)
        return {named.name: reader.take(named.tensor) for named in state}

    def _settle_doubt(self, asked: int) -> None:
        """Finds out whether a step that was never answered was carried out, unless the same is asked again."""
        if self._doubt is None or self._doubt[0] == asked:
            return
        carried_out, before = self._doubt[1], self.last_seq
        self.attach()
        if self.last_seq > before:
            carried_out()
        self._doubt = None

    def _sent(
        self, transport: Transport, step: step_pb2.StepInput, parts: list[memoryview]
    ) -> tuple[step_pb2.StepOutput, bytes]:
        deadline, pause = time.monotonic() + self.timeout, _FIRST_PAUSE_S
        while True:
            try:
                if self._steps is None:
                    self._steps = transport.steps()
                return self._steps.exchange(step, parts, deadline - time.monotonic())
            except GradbankError as error:
                self._drop()  # what state the stream is in is not known
                left = deadline - time.monotonic()
                if not isinstance(error, ServerUnavailable) or left <= 0:
                    raise
                time.sleep(min(pause, left))
                if deadline - time.monotonic() <= 0:
                    raise ServerUnavailable(
                        f"step {step.seq} could not be sent for {self.timeout:.3g} s: {error}. If it was carried out, "
                        "the server still has the answer: calling again with the same batch is safe"
                    ) from None
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def close(self) -> None:
        self._drop()

    def _drop(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None
