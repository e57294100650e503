"""Answers that no gradbank server gives: each is an error that says so, and none is taken for a loss."""

import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest

from gradbank.errors import GradbankError, InternalError, ServerUnavailable
from gradbank.remote.stream import GrpcSteps
from gradbank.remote.transport import answer_of
from gradbank.v1 import step_pb2
from gradbank.wire import Frame


def first(seq: int = 1, size: int = 0) -> bytes:
    return Frame(step_pb2.StepOutput(seq=seq, payload_bytes=size), ()).encoded()


@pytest.mark.parametrize(
    ("answers", "kind", "message"),
    [
        ([], ServerUnavailable, "the server ended the stream of steps"),
        ([first(size=9)], ServerUnavailable, "in the middle of an answer"),
        ([Frame(None, [memoryview(b"ab")]).encoded()], InternalError, "it begins in the middle"),
        ([first(size=1), Frame(None, [memoryview(b"ab")]).encoded()], InternalError, "of 1 bytes was announced"),
        ([first(size=2**60)], InternalError, "cannot be read"),
        ([first(seq=7)], InternalError, "step 1 was answered by the answer of step 7"),
        ([b"\xff\xff"], InternalError, "deserializing"),
    ],
    ids=["none", "cut off", "no beginning", "too long", "too large", "another's", "no message"],
)
def test_an_answer_that_is_none_is_an_error_by_name(
    answers: list[bytes], kind: type[GradbankError], message: str
) -> None:
    def steps(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        next(requests)
        yield from answers

    server = grpc.server(futures.ThreadPoolExecutor(2))
    handler = grpc.stream_stream_rpc_method_handler(steps)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("gradbank.v1.StepService", {"Steps": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stream = GrpcSteps(channel, threading.Event(), lambda: None, lambda: None)
            stream.send(step_pb2.StepInput(seq=1), [], 10)
            with pytest.raises(kind, match=message):
                answer_of(stream, 1, 10)
            stream.close()
    finally:
        server.stop(0)
