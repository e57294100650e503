"""A row of steps over gRPC."""

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
from torch import Tensor

from gradbank.errors import DeadlineExceeded, GradbankError, InternalError, InvalidRequest, ServerUnavailable
from gradbank.v1 import step_pb2
from gradbank.wire import Assembly, Frame, chunks, error_of, response_frame

_LONGEST_WAIT_S = 60.0  # a lock cannot be waited for as long as a timeout may be


class GrpcSteps:
    """One stream of steps. Who waits for an answer reads it, and a thread beside ends the wait in time.

    Args:
        left: set once the channel is not to be used: a call that was interrupted there may have left a lock taken.
        interrupted: called when this one may have.
        late: called when nothing came over it in time.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        left: threading.Event,
        interrupted: Callable[[], object],
        late: Callable[[], object],
    ) -> None:
        self._left, self._interrupted, self._late, self._process = left, interrupted, late, os.getpid()
        self._requests: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        steps: Any = channel.stream_stream("/gradbank.v1.StepService/Steps", response_deserializer=response_frame)
        self._call = steps(_encoded(self._requests))
        self._watch = _Watch(self._call.cancel)

    def __del__(self) -> None:  # no thread holds this one, but two wait for what it has to say
        if hasattr(self, "_watch") and os.getpid() == self._process:  # in a forked child there are none
            self._requests.put(None)
            self._watch.close()

    def takes(self, step: step_pb2.StepInput) -> bool:
        return not self._left.is_set()

    def prepare(self, step: step_pb2.StepInput, timeout: float) -> None:
        self._check()

    def send(self, step: step_pb2.StepInput, payload: Iterable[memoryview], timeout: float) -> None:
        self._check()
        for i, part in enumerate(chunks(payload)):
            self._requests.put(Frame(step if i == 0 else None, part))

    def receive(self, timeout: float) -> tuple[step_pb2.StepOutput, Tensor]:
        deadline = time.monotonic() + timeout
        if self._left.is_set():
            self._check()
        with self._watch.until(deadline):
            try:
                return self._answer()
            except grpc.RpcError as error:
                if self._watch.ended and time.monotonic() >= deadline:  # and not that of an answer before
                    self._late()  # what lies between may have let the connection die without a word
                    raise DeadlineExceeded(f"no answer came within {timeout:.3g} s") from None
                raise error_of(error) from None
            except GradbankError:
                raise
            except BaseException:
                self._interrupted()
                raise

    def _check(self) -> None:
        if self._left.is_set() or self._watch.ended:  # at the last moment of a step that was answered nonetheless
            raise ServerUnavailable("the stream of steps was ended")

    def close(self) -> None:
        self._requests.put(None)
        self._watch.close()
        if self._left.is_set():
            end_beside(self._call.cancel)
        else:
            self._call.cancel()

    def _answer(self) -> tuple[step_pb2.StepOutput, Tensor]:
        frame = next(self._call, None)
        if frame is None:
            raise ServerUnavailable("the server ended the stream of steps")
        if frame.step is None:
            raise InternalError("the server's answer cannot be read: it begins in the middle")
        output = frame.step
        assert isinstance(output, step_pb2.StepOutput)
        try:
            payload = Assembly(output.payload_bytes)
            while True:
                for part in frame.payload:
                    payload.add(part)
                if payload.complete:
                    return output, payload.payload()
                frame = next(self._call, None)
                if frame is None:
                    raise ServerUnavailable("the server ended the stream in the middle of an answer")
        except (InvalidRequest, RuntimeError) as error:  # torch's own, where more is announced than there is memory
            raise InternalError(f"the server's answer cannot be read: {error}") from None


def _encoded(requests: "queue.SimpleQueue[Frame | None]") -> Iterator[bytes]:
    """The messages to send. gRPC holds on to the last one until the next: a frame would hold the whole batch."""
    while (frame := requests.get()) is not None:
        message = frame.encoded()
        del frame
        yield message


def end_beside(end: Callable[[], object]) -> None:
    """Ends what was interrupted inside gRPC, in a thread that may wait for ever; so may whoever drops the last
    reference to it, and the thread holds one."""
    threading.Thread(target=end, name="gradbank-end", daemon=True).start()


class _Watch:
    """Calls `end` if something is not over in time.

    Attributes:
        ended: whether it has.
    """

    def __init__(self, end: Callable[[], object]) -> None:
        self._end, self.ended = end, False
        self._until, self._wakes, self._closed = math.inf, math.inf, False
        self._lock = threading.Lock()
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="gradbank-watch", daemon=True).start()

    @contextmanager
    def until(self, time_s: float) -> Iterator[None]:
        """Whatever runs in the block is to be over at that time of `time.monotonic`."""
        with self._lock:
            self._until = time_s
            if time_s < self._wakes:  # else the thread looks again before that, and need not be woken
                self._woken.put(None)
        try:
            yield
        finally:
            with self._lock:  # from here on it has ended, or will not
                self._until = math.inf

    def close(self) -> None:
        """Without the lock, for Python may drop what has this in the midst of what has taken it."""
        self._closed = True
        self._woken.put(None)

    def _run(self) -> None:
        while not self._closed:
            with self._lock:
                now = time.monotonic()
                if self._until <= now:
                    self.ended = True
                    self._end()
                    return
                self._wakes = min(self._until, now + _LONGEST_WAIT_S) if self._until < math.inf else math.inf
                wait_s = None if self._wakes == math.inf else self._wakes - now
            with suppress(queue.Empty):
                self._woken.get(timeout=wait_s)
