"""Steps and answers: messages to and from what a session takes and gives."""

import math
import time
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
import xxhash
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from torch import Tensor

from gradbank.errors import GradbankError, InvalidRequest
from gradbank.v1 import step_pb2, tensor_pb2
from gradbank.wire import CHUNK_BYTES, LONGEST_S, TensorReader, argument_values, describe, torch_dtype, wire_dtype
from gradbank_server.sessions import Answer, Backward, Batch, OptimizerStep, WeightEvent, ZeroGradient

_HIGHEST = 15  # below 2 to this, float16 has all of its digits


class Arrived(NamedTuple):
    """A step, when all of it is there.

    Attributes:
        batch: what its session is asked to do.
        digest: what a retry must repeat: of the header, which says where, and of the payload, which says what.
        at: when its last byte came, of `time.perf_counter`; decode_s: how many seconds it took to make the rest of it.
        refused: why it is not to be carried out; then there is no batch.
    """

    step: step_pb2.StepInput
    batch: Batch
    digest: int
    at: float
    decode_s: float
    refused: GradbankError | None = None

    @staticmethod
    def of(step: step_pb2.StepInput, payload: Tensor, at: float) -> "Arrived":
        """A step that was checked, and the bytes of its tensors."""
        begun = time.perf_counter()
        try:
            batch = batch_of(step, payload)
        except GradbankError as error:
            return Arrived.refusal(step, error)
        asked = step_pb2.StepInput()
        asked.CopyFrom(step)
        # the first two say what came of other steps; which epoch it is sent in is looked at apart
        for field in ("answered_seq", "trainer_timings", "epoch"):
            asked.ClearField(field)
        header = zlib.crc32(asked.SerializeToString(deterministic=True))
        digest = xxhash.xxh3_64_intdigest(payload.numpy().data, seed=header)
        return Arrived(step, batch, digest, at, time.perf_counter() - begun)

    @staticmethod
    def refusal(step: step_pb2.StepInput, error: GradbankError) -> "Arrived":
        return Arrived(step, Batch(), 0, 0.0, 0.0, error)

    @property
    def next_is_worth_reading(self) -> bool:
        """Whether the next step is to be read while this one is computed: if the trainer does not wait for the answer
        before he sends it, and if to read one takes longer than to wake a thread."""
        return self.step.seq > self.step.answered_seq + 1 and self.step.payload_bytes >= CHUNK_BYTES


def tensors_of(step: step_pb2.StepInput) -> Iterator[tensor_pb2.Tensor]:
    """The tensors of a step that are set, in the order of the payload."""
    for name in ("embeddings", "labels", "ref_emb", "ref_labels"):
        if step.HasField(name):
            yield getattr(step, name)
    yield from step.indices
    if step.HasField("enqueue_mask"):
        yield step.enqueue_mask


def batch_of(step: step_pb2.StepInput, payload: Tensor) -> Batch:
    """What a session is asked to do.

    Raises:
        InvalidRequest: a payload that does not fit the tensors.
    """
    reader = TensorReader(payload)
    named = {
        name: reader.take(getattr(step, name)) if step.HasField(name) else None
        for name in ("embeddings", "labels", "ref_emb", "ref_labels")
    }
    indices = tuple(reader.take(index) for index in step.indices)
    indices = tuple(index.long() if index.dtype == torch.int32 else index for index in indices)
    mask = reader.take(step.enqueue_mask) if step.HasField("enqueue_mask") else None
    reader.finish()
    return Batch(
        **named,
        indices=indices,
        enqueue_mask=mask,
        embeddings_need_gradient=step.embeddings_need_gradient,
        ref_emb_needs_gradient=step.ref_emb_needs_gradient,
        weights_need_gradient=step.weights_need_gradient,
        weight_events=tuple(_weight_event(event) for event in step.weight_events),
        resets_queue=step.resets_queue,
        answered=step.answered_seq,
    )


def check_header(step: step_pb2.StepInput) -> None:
    """Refuses what no trainer can mean.

    Raises:
        InvalidRequest: what a newer trainer may mean, gradients in a dtype that they are not rounded to, an answer to a
            step that is to come, times that no clock shows, a batch for a queue that it empties, or other
            tensors than embeddings without these.
    """
    if any(len(UnknownFieldSet(each)) for each in (step, *tensors_of(step), *_told(step))):
        raise InvalidRequest(
            "the step says something that this server does not know: it is older than the trainer; run the same "
            "version of gradbank on both sides"
        )
    if step.resets_queue and step.HasField("embeddings"):
        raise InvalidRequest("a step that resets the queue has no embeddings: send these in the next one")
    if not step.HasField("embeddings") and any(True for _ in tensors_of(step)):
        raise InvalidRequest("a step without embeddings has no other tensors either: was `embeddings` forgotten?")
    if step.answered_seq and step.answered_seq >= step.seq:
        raise InvalidRequest(f"answered_seq is {step.answered_seq}, and this is step {step.seq}: it can have none yet")
    told = step.trainer_timings
    if not all(0 <= spent <= LONGEST_S for spent in (told.client_encode_s, told.network_s, told.client_decode_s)):
        raise InvalidRequest(f"trainer_timings must be from 0 to {LONGEST_S:,.0f} seconds")
    if step.gradient_dtype not in (0, tensor_pb2.DTYPE_BFLOAT16, tensor_pb2.DTYPE_FLOAT16):
        raise InvalidRequest(f"gradient_dtype must be bfloat16 or float16, got {step.gradient_dtype}")


def _told(step: step_pb2.StepInput) -> Iterator[Message]:
    """The weight events of a step, and what they say."""
    for event in step.weight_events:
        yield event
        kind = event.WhichOneof("event")
        if kind in ("backward", "optimizer_step"):
            yield getattr(event, kind)


def answer_message(answer: Answer, rounded: int) -> tuple[step_pb2.StepOutput, list[memoryview]]:
    """An answer, and the bytes of its tensors: gradients rounded to a dtype of the wire, or as they are for 0."""
    dtype = wire_dtype(answer.loss.dtype)
    output = step_pb2.StepOutput(
        loss=answer.value, loss_dtype=dtype, bank_rows=answer.bank_rows, statistics=answer.statistics
    )
    payload = []
    for field in ("embeddings_gradient", "ref_emb_gradient"):
        gradient = getattr(answer, field)
        if gradient is not None:
            if rounded:
                gradient, exponent = _rounded(gradient, torch_dtype(rounded))
                setattr(output, f"{field}_exponent", exponent)
            message, data = describe(gradient)
            getattr(output, field).CopyFrom(message)
            payload.append(data)
    return output, payload


def _rounded(gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The gradient in half precision, and the exponent of 2 that it is to be multiplied by."""
    if dtype == torch.bfloat16 or not gradient.numel():
        return gradient.to(dtype), 0
    # float16 has few exponents: the largest entry is brought near the upper end of them, as far as a factor can
    exponent = math.frexp(float(torch.linalg.vector_norm(gradient, torch.inf)))[1] - _HIGHEST
    exponent = max(exponent, math.frexp(torch.finfo(gradient.dtype).tiny)[1])
    return (gradient * 2.0**-exponent).to(dtype), exponent


def _weight_event(event: step_pb2.WeightEvent) -> WeightEvent:
    match event.WhichOneof("event"):
        case "backward":
            return Backward(event.backward.seq, event.backward.scale)
        case "optimizer_step":
            options = argument_values(event.optimizer_step.options, "optimizer_step")
            return OptimizerStep(event.optimizer_step.gradient_scale, options)
        case "zero_gradient":
            return ZeroGradient()
        case None:
            raise InvalidRequest("a weight event says nothing: set backward, optimizer_step or zero_gradient")
