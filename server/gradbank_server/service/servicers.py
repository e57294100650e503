"""The service behind gRPC: framing, statuses, and nothing else."""

import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NoReturn

import grpc
import structlog
from grpc_reflection.v1alpha import reflection

from gradbank.errors import GradbankError, InvalidRequest, LimitExceeded
from gradbank.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    stats_pb2,
    stats_pb2_grpc,
    step_pb2,
)
from gradbank.wire import (
    ERROR_TRAILER,
    MESSAGE_BYTES,
    Assembly,
    Frame,
    assembled,
    chunks,
    error_message,
    error_of,
    gradient_bytes,
    request_frame,
    status_of,
)
from gradbank_server.service.ahead import Ahead
from gradbank_server.service.faults import told
from gradbank_server.service.gate import Gate
from gradbank_server.service.service import Service
from gradbank_server.service.steps import Arrived
from gradbank_server.threads import let_helpers_go

log = structlog.get_logger()

_BESIDE_BYTES = 2**16  # what an answer has beside its gradients, at most: statistics
_DETAILS = 300  # characters for who does not read the trailer; both together may take 8 KiB
_HERE = ("unix:", "ipv4:127.", "ipv6:%5B::1%5D", "ipv6:[::1]")  # peers on the server's machine, as gRPC has them


class SessionServicer(session_pb2_grpc.SessionServiceServicer):
    def __init__(self, service: Service, gate: Gate) -> None:
        self._service, self._gate = service, gate

    def CreateSession(
        self, request_iterator: Iterator[session_pb2.CreateSessionRequest], context: grpc.ServicerContext
    ) -> session_pb2.CreateSessionResponse:
        with _status(context, self._service), self._gate.transfer():
            self._gate.check()
            header = next(request_iterator, None)
            if header is None:
                raise InvalidRequest("the stream ended before it named a session")
            payload = Assembly(self._service.state_bytes(header))
            payload.add(header.payload)
            for part in request_iterator:
                payload.add(part.payload)
            response = self._service.create_session(header, payload.payload())
            if response.created:
                log.info("session created", session=response.session.name, loss=response.session.loss.name)
            return response

    def AttachSession(
        self, request: session_pb2.AttachSessionRequest, context: grpc.ServicerContext
    ) -> session_pb2.AttachSessionResponse:
        with _status(context, self._service), self._gate.turn():
            self._gate.check()
            response = self._service.attach_session(request)
            log.info("trainer attached", session=request.session, rank=request.rank, epoch=response.epoch)
            return response

    def ConfigureOptimizer(
        self, request: session_pb2.ConfigureOptimizerRequest, context: grpc.ServicerContext
    ) -> session_pb2.ConfigureOptimizerResponse:
        with _status(context, self._service), self._gate.turn():
            return self._service.configure_optimizer(request)

    def PullState(
        self, request: session_pb2.PullStateRequest, context: grpc.ServicerContext
    ) -> Iterator[session_pb2.PullStateResponse]:
        with _status(context, self._service), self._gate.transfer():
            state, payload = self._service.pull_state(request)
            for i, part in enumerate(chunks(payload)):
                yield session_pb2.PullStateResponse(state=state if i == 0 else [], payload=b"".join(part))

    def GetSession(
        self, request: session_pb2.GetSessionRequest, context: grpc.ServicerContext
    ) -> session_pb2.GetSessionResponse:
        with _status(context, self._service):
            return self._service.get_session(request)

    def ListSessions(
        self, request: session_pb2.ListSessionsRequest, context: grpc.ServicerContext
    ) -> session_pb2.ListSessionsResponse:
        with _status(context, self._service):
            return self._service.list_sessions(request)

    def CloseSession(
        self, request: session_pb2.CloseSessionRequest, context: grpc.ServicerContext
    ) -> session_pb2.CloseSessionResponse:
        with _status(context, self._service), self._gate.turn():
            response = self._service.close_session(request)
            if response.existed:
                log.info("session closed", session=request.session)
            return response


class StepServicer:
    """The service of steps, whose stream is not read and written by generated code; see `gradbank.wire.frames`."""

    def __init__(self, service: Service, gate: Gate) -> None:
        self._service, self._gate = service, gate

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a gRPC server is given."""
        return grpc.method_handlers_generic_handler(
            step_pb2.DESCRIPTOR.services_by_name["StepService"].full_name,
            {
                "Steps": grpc.stream_stream_rpc_method_handler(self.Steps, request_frame),
                "Step": grpc.unary_unary_rpc_method_handler(
                    self.Step, step_pb2.StepRequest.FromString, step_pb2.StepResponse.SerializeToString
                ),
            },
        )

    def Steps(self, requests: Iterator[Frame | InvalidRequest], context: grpc.ServicerContext) -> Iterator[bytes]:
        with (
            _status(context, self._service),
            self._gate.stream(),
            closing(Ahead(self._arriving(requests, context))) as steps,
        ):
            for arrived in steps:
                self._gate.check()
                if arrived.next_is_worth_reading:
                    steps.read()
                output, data = self._service.answered(arrived)
                del arrived  # before the next one comes, for it may be large
                for i, part in enumerate(chunks(data)):
                    # as bytes: gRPC holds on to the last one until the next, and a frame would hold the whole answer
                    yield Frame(output if i == 0 else None, part).encoded()
                del data, part

    def Step(self, request: step_pb2.StepRequest, context: grpc.ServicerContext) -> step_pb2.StepResponse:
        with _status(context, self._service), self._gate.turn():
            self._gate.check()
            self._service.check_step(request.step)
            if gradient_bytes(request.step) > MESSAGE_BYTES - _BESIDE_BYTES:
                raise LimitExceeded(
                    f"the gradients take {gradient_bytes(request.step):,} bytes, and an answer of Step is one message "
                    f"of at most {MESSAGE_BYTES:,}: use Steps, or have them rounded (gradient_dtype)"
                )
            payload = assembled([memoryview(request.payload)])
            arrived = Arrived.of(request.step, payload, time.perf_counter())
            output, data = self._service.answered(arrived)
        if output.HasField("error"):
            _abort(context, error_of(output.error))  # which is counted already, as a step
        return step_pb2.StepResponse(step=output, payload=b"".join(data))

    def _arriving(self, requests: Iterator[Frame | InvalidRequest], context: grpc.ServicerContext) -> Iterator[Arrived]:
        """Whole steps; one that is refused by its header is read to its end, but not kept."""
        while (frame := _next(requests)) is not None:
            if frame.step is None:
                raise InvalidRequest("a step begins with a message that has `step`, and this one has only a payload")
            step, refused = frame.step, None
            assert isinstance(step, step_pb2.StepInput)
            try:
                self._service.check_step(step)
            except GradbankError as error:
                refused = error
            payload, seen = Assembly(0 if refused else step.payload_bytes), 0
            while True:
                seen += frame.size
                if seen > step.payload_bytes:
                    raise InvalidRequest(f"step {step.seq} announced {step.payload_bytes} bytes, and {seen} came")
                for part in frame.payload if refused is None else ():
                    payload.add(part)
                if seen == step.payload_bytes:
                    break
                frame = _next(requests)
                if frame is None:
                    if context.is_active():
                        raise InvalidRequest(
                            f"step {step.seq} was not complete when the stream ended: {seen:,} of its "
                            f"{step.payload_bytes:,} bytes came"
                        )
                    return  # the trainer went away in the middle of a step: nothing happened
                if frame.step is not None:
                    raise InvalidRequest(f"step {step.seq} was not complete when the next one began")
            at = time.perf_counter()
            arrived = Arrived.refusal(step, refused) if refused else Arrived.of(step, payload.payload(), at)
            del payload, frame  # while it waits for the next one, nothing of this one is held here
            yield arrived
            del arrived


def _next(requests: Iterator[Frame | InvalidRequest]) -> Frame | None:
    frame = next(requests, None)
    if isinstance(frame, InvalidRequest):
        raise frame
    return frame


class StatsServicer(stats_pb2_grpc.StatsServiceServicer):
    """Args: nearer: where else the server listens, for who is on its machine."""

    def __init__(self, service: Service, gate: Gate, nearer: stats_pb2.GetServerResponse) -> None:
        self._service, self._gate, self._nearer = service, gate, nearer

    def GetStats(self, request: stats_pb2.GetStatsRequest, context: grpc.ServicerContext) -> stats_pb2.GetStatsResponse:
        with _status(context, self._service):
            return self._service.get_stats(request)

    def WatchStats(
        self, request: stats_pb2.WatchStatsRequest, context: grpc.ServicerContext
    ) -> Iterator[stats_pb2.WatchStatsResponse]:
        with _status(context, self._service), self._gate.stream():

            def pause(seconds: float) -> bool:
                return self._gate.closing.wait(seconds) or not context.is_active()

            yield from self._service.watch_stats(request, pause)

    def GetServer(
        self, request: stats_pb2.GetServerRequest, context: grpc.ServicerContext
    ) -> stats_pb2.GetServerResponse:
        with _status(context, self._service):
            response = self._service.get_server(request)
            if context.peer().startswith(_HERE):
                response.MergeFrom(self._nearer)
            return response


class CatalogServicer(catalog_pb2_grpc.CatalogServiceServicer):
    def __init__(self, service: Service) -> None:
        self._service = service

    def ListComponents(
        self, request: catalog_pb2.ListComponentsRequest, context: grpc.ServicerContext
    ) -> catalog_pb2.ListComponentsResponse:
        with _status(context, self._service):
            return self._service.list_components(request)


class ReflectionServicer(reflection.ReflectionServicer):  # type: ignore[misc]  # gRPC's, without types
    """gRPC's, of which each stream holds a thread."""

    def __init__(self, names: Iterable[str], service: Service, gate: Gate) -> None:
        super().__init__(names)
        self._service, self._gate = service, gate

    def ServerReflectionInfo(self, request_iterator: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        with _status(context, self._service), self._gate.look():
            yield from super().ServerReflectionInfo(request_iterator, context)


@contextmanager
def _status(context: grpc.ServicerContext, service: Service) -> Iterator[None]:
    """Ends the call with the status of the error raised inside."""
    try:
        yield
    except GradbankError as error:
        service.refused(error)
        _abort(context, error)
    except Exception as error:
        if not context.is_active():
            raise  # the peer went away, and gRPC ends the call
        said = told(error)
        service.refused(said)
        _abort(context, said)
    finally:
        let_helpers_go()


def _abort(context: grpc.ServicerContext, error: GradbankError) -> NoReturn:
    context.set_trailing_metadata(((ERROR_TRAILER, error_message(error).SerializeToString()),))
    context.abort(status_of(error), str(error)[:_DETAILS])
