"""The calls of every gradbank service, as functions from message to message that raise `GradbankError`s.

gRPC's servicers and the embedded transport both call these, so a loss does the same behind either.
"""

import math
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import structlog
import torch
from torch import Tensor

from gradbank import __version__
from gradbank.errors import (
    GradbankError,
    InternalError,
    InvalidRequest,
    LimitExceeded,
    SessionNotFound,
    StepConflict,
)
from gradbank.v1 import catalog_pb2, session_pb2, stats_pb2, step_pb2
from gradbank.wire import (
    argument_messages,
    argument_values,
    component_message,
    error_message,
    leave_out_entries,
    nbytes,
    seconds_of,
    spec_of,
    state_bytes,
    state_message,
    state_of,
)
from gradbank_server.allocator import give_back
from gradbank_server.build import build_loss, import_components
from gradbank_server.service.catalog import component_infos
from gradbank_server.service.faults import fault, refusal
from gradbank_server.service.steps import Arrived, answer_message, check_header, tensors_of
from gradbank_server.sessions import Limits, OptimizerSpec, Run, Session, Sessions, Tally, here
from gradbank_server.settings import ServerSettings
from gradbank_server.stats import Metrics
from gradbank_server.storage import MemoryStorage

log = structlog.get_logger()

Payload = list[memoryview]
_BESIDE_ROWS = 64  # bytes of a bank's cursor and the like
_LOOKS_EVERY_S = 0.5  # whether what is watched, or who watches it, is still there
M = TypeVar("M", step_pb2.Timings, step_pb2.TrainerTimings)


class Service:
    """Sessions, spoken to in messages.

    Args:
        run: has steps computed.
        lost: called when the device failed in such a way that this process cannot use it any more.
    """

    def __init__(
        self,
        settings: ServerSettings,
        device: torch.device,
        run: Run = here,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        import_components(settings.components)
        self.settings, self.device, self._run, self._lost = settings, device, run, lost
        self.boot_id = secrets.token_hex(8)
        limits = Limits(settings.max_sessions, settings.max_session_bytes)
        self.sessions = Sessions(build_loss, device, limits, MemoryStorage(), time.monotonic, run)
        self.metrics = Metrics(self.sessions, str(device))

    # -- sessions ---------------------------------------------------------------------------------------------

    def state_bytes(self, header: session_pb2.CreateSessionRequest) -> int:
        """How long the state of a request to create a session is; refused if no session could hold it."""
        size = state_bytes(header.state)
        limit = self.settings.max_session_bytes
        # in float64 it is twice what a session is counted as, which is looked at once it is there
        if size > 2 * limit + _BESIDE_ROWS:
            raise LimitExceeded(f"the session's state takes {size:,} bytes, and a session may take {limit:,}")
        return size

    def create_session(
        self, header: session_pb2.CreateSessionRequest, payload: Tensor
    ) -> session_pb2.CreateSessionResponse:
        state = state_of(header.state, payload)
        session, created = self.sessions.create(header.name, spec_of(header.loss), state)
        return session_pb2.CreateSessionResponse(session=_described(session), created=created)

    def attach_session(self, request: session_pb2.AttachSessionRequest) -> session_pb2.AttachSessionResponse:
        if len(request.nonce) != 16:
            raise InvalidRequest(f"a nonce is 16 random bytes, got {len(request.nonce)}")
        session = self.sessions[request.session]
        held = session.attach(request.rank, request.incarnation, request.nonce, request.previous_nonce)
        return session_pb2.AttachSessionResponse(
            epoch=held.epoch,
            last_seq=held.last_seq,
            max_step_bytes=self.settings.max_step_bytes,
        )

    def configure_optimizer(
        self, request: session_pb2.ConfigureOptimizerRequest
    ) -> session_pb2.ConfigureOptimizerResponse:
        asked = OptimizerSpec(request.optimizer.name, argument_values(request.optimizer.options, "optimizer"))
        spec = self.sessions[request.session].configure(asked)
        return session_pb2.ConfigureOptimizerResponse(optimizer=_optimizer(spec))

    def pull_state(self, request: session_pb2.PullStateRequest) -> tuple[list[session_pb2.NamedTensor], Payload]:
        return state_message(self.sessions[request.session].state())

    def get_session(self, request: session_pb2.GetSessionRequest) -> session_pb2.GetSessionResponse:
        return session_pb2.GetSessionResponse(session=_described(self.sessions[request.session]))

    def list_sessions(self, request: session_pb2.ListSessionsRequest) -> session_pb2.ListSessionsResponse:
        response = session_pb2.ListSessionsResponse(sessions=[_described(s) for s in self.sessions.all()])
        for session in response.sessions:
            leave_out_entries(session.loss)  # which together are more than a message may be
        return response

    def close_session(self, request: session_pb2.CloseSessionRequest) -> session_pb2.CloseSessionResponse:
        existed = self.sessions.close(request.session)
        give_back()  # weights and their gradients are often too small for the system to have them back at once
        return session_pb2.CloseSessionResponse(existed=existed)

    # -- steps ------------------------------------------------------------------------------------------------

    def check_step(self, step: step_pb2.StepInput) -> None:
        """Refuses a step before its payload is taken in.

        Raises:
            InvalidRequest: a size that is not that of its tensors, or else what no trainer can mean.
            LimitExceeded: larger than the server allows.
        """
        limit = self.settings.max_step_bytes
        if step.payload_bytes > limit:
            raise LimitExceeded(
                f"the step's tensors take {step.payload_bytes:,} bytes, and a step may take {limit:,}; send smaller "
                "batches, or start the server with a larger --max-step-bytes"
            )
        size = sum(nbytes(tensor) for tensor in tensors_of(step))
        if size != step.payload_bytes:
            raise InvalidRequest(f"the step's tensors take {size} bytes, but its payload has {step.payload_bytes}")
        check_header(step)

    def step(self, arrived: Arrived) -> tuple[step_pb2.StepOutput, Payload]:
        """Carries out a step. A failure is data: an output with `error` set."""
        step = arrived.step
        try:
            if arrived.refused is not None:
                raise arrived.refused
            return self._stepped(self.sessions[step.session], arrived)
        except GradbankError as error:
            # what was sent behind a refused step is refused for its number, and sent again under another
            outcome = "conflict" if isinstance(error, StepConflict) else "rejected"
            self.metrics.stepped(self._title(step.session), outcome)
            self._note_limit(error, session=step.session, rank=step.rank)
            # no name for what is told: a frame that its own exception leads to is freed when Python gets to it
            told = error_message(refusal(error, self.settings.components))
            return step_pb2.StepOutput(seq=step.seq, error=told), []

    def answered(self, arrived: Arrived) -> tuple[step_pb2.StepOutput, Payload]:
        """The same, for a trainer elsewhere: of a fault of ours he is told an id, and the log has the rest."""
        try:
            return self.step(arrived)
        except Exception as error:
            self.metrics.stepped(self._title(arrived.step.session), "failed")
            if isinstance(error, torch.AcceleratorError):  # as each one after it would, whoever's it is
                self._lost()
            return self.failed(arrived.step, fault(error, self.settings.components)), []

    def refused(self, error: GradbankError) -> None:
        """Counts a call that is refused; who runs the server is told if that is because it is full."""
        self.metrics.refused(type(error).__name__)
        self._note_limit(error)

    def _note_limit(self, error: GradbankError, **where: Any) -> None:
        if isinstance(error, LimitExceeded):
            log.warning("refused by a limit", reason=str(error), **where)

    def _title(self, session: str) -> str:
        """The loss of a session, for statistics."""
        try:
            return self.sessions[session].spec.title()
        except SessionNotFound:
            return "unknown"

    def failed(self, step: step_pb2.StepInput, error: InternalError) -> step_pb2.StepOutput:
        """What a trainer is told of a fault of ours."""
        output = step_pb2.StepOutput(seq=step.seq, error=error_message(error))
        with suppress(SessionNotFound):
            output.carried_out = self.sessions[step.session].has_carried_out(step.rank, step.epoch, step.seq)
        return output

    def _stepped(self, session: Session, arrived: Arrived) -> tuple[step_pb2.StepOutput, Payload]:
        step, begun = arrived.step, time.perf_counter()
        answer, replayed, waited = session.step(step.rank, step.epoch, step.seq, arrived.digest, arrived.batch)
        computed = time.perf_counter()
        encode = partial(answer_message, answer, step.gradient_dtype)
        output, data = self._run(encode) if step.gradient_dtype else encode()  # to round is to compute
        output.seq, output.replayed = step.seq, replayed
        output.payload_bytes = sum(len(part) for part in data)
        seconds = {
            "queue": begun - arrived.at - arrived.decode_s + waited,
            "decode": arrived.decode_s,
            "compute": computed - begun - waited,
            "encode": time.perf_counter() - computed,
        }
        output.timings.CopyFrom(step_pb2.Timings(**{f"{phase}_s": spent for phase, spent in seconds.items()}))
        outcome = "replayed" if replayed else "ok" if arrived.batch.compares else "told"
        if outcome != "ok":
            seconds = {}  # no mean of a step's time is to have them in it
        if step.HasField("trainer_timings") and not replayed:  # of the step before
            seconds |= seconds_of(step.trainer_timings)
        session.timed(seconds, step.payload_bytes, output.payload_bytes)
        self.metrics.stepped(session.spec.title(), outcome)
        self.metrics.timed(seconds, step.payload_bytes, output.payload_bytes)
        return output, data

    # -- statistics and catalog ---------------------------------------------------------------------------------

    def get_stats(self, request: stats_pb2.GetStatsRequest) -> stats_pb2.GetStatsResponse:
        return stats_pb2.GetStatsResponse(stats=self._stats(self.sessions[request.session]))

    def watch_stats(
        self, request: stats_pb2.WatchStatsRequest, pause: Callable[[float], bool]
    ) -> Iterator[stats_pb2.WatchStatsResponse]:
        """Statistics every interval, until the session ends or `pause` says so."""
        if not request.interval_s >= 0.05:
            raise InvalidRequest(f"interval_s must be at least 0.05, got {request.interval_s}")
        session = self.sessions[request.session]
        while not session.closed:
            yield stats_pb2.WatchStatsResponse(stats=self._stats(session))
            until = time.monotonic() + request.interval_s
            while (left := until - time.monotonic()) > 0 and not session.closed:
                if pause(min(left, _LOOKS_EVERY_S)):
                    return

    def get_server(self, request: stats_pb2.GetServerRequest) -> stats_pb2.GetServerResponse:
        return stats_pb2.GetServerResponse(
            version=__version__,
            device=str(self.device),
            boot_id=self.boot_id,
            max_sessions=self.settings.max_sessions,
            max_session_bytes=self.settings.max_session_bytes,
            max_step_bytes=self.settings.max_step_bytes,
            sessions=len(self.sessions),
            torch_version=torch.__version__,
        )

    def list_components(self, request: catalog_pb2.ListComponentsRequest) -> catalog_pb2.ListComponentsResponse:
        return catalog_pb2.ListComponentsResponse(components=component_infos())

    def _stats(self, session: Session) -> stats_pb2.SessionStats:
        tally, banks, now = session.tally, session.banks, time.monotonic()
        return stats_pb2.SessionStats(
            session=session.name,
            steps=tally.steps,
            replayed=tally.replayed,
            rejected=tally.rejected,
            optimizer_steps=tally.optimizer_steps,
            last_loss=tally.last_loss,
            mean_loss=tally.mean_loss,
            bank_rows=session.bank_rows,
            bank_capacity=sum(bank.capacity for bank in banks),
            bank_bytes=sum(bank.nbytes for bank in banks),
            weight_bytes=session.weight_bytes,
            received_bytes=tally.received_bytes,
            sent_bytes=tally.sent_bytes,
            age_s=now - tally.created,
            idle_s=math.nan if math.isnan(tally.last_step) else now - tally.last_step,
            mean_timings=_means(tally, step_pb2.Timings),
            mean_trainer_timings=_means(tally, step_pb2.TrainerTimings),
            statistics=tally.statistics,
        )


def _described(session: Session) -> session_pb2.Session:
    optimizer = session.optimizer
    return session_pb2.Session(
        name=session.name,
        loss=component_message(session.spec),
        optimizer=None if optimizer is None else _optimizer(optimizer),
        ranks=session.ranks,
        steps=session.tally.steps,
    )


def _means(tally: Tally, kind: type[M]) -> M:
    """The mean times of the phases that a kind of message has."""
    return kind(**{each.name: tally.mean_seconds(each.name.removesuffix("_s")) for each in kind.DESCRIPTOR.fields})


def _optimizer(spec: OptimizerSpec) -> session_pb2.Optimizer:
    return session_pb2.Optimizer(name=spec.name, options=argument_messages(spec.options, spec.name))
