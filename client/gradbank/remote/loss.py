"""A loss that a server computes: one round trip brings its value and every gradient."""

import inspect
import time
from typing import Any

import torch
from torch import Tensor, nn

from gradbank.engine.eager import refuse_second_derivatives, scaled
from gradbank.errors import InvalidRequest, SessionConflict
from gradbank.losses.base import Loss
from gradbank.memory import enqueue_mask_of
from gradbank.remote.optimizer import RemoteOptimizer
from gradbank.remote.producer import Producer
from gradbank.remote.stats import seconds_of
from gradbank.v1 import step_pb2, tensor_pb2
from gradbank.wire import TensorReader, describe, torch_dtype

_SENT = {"embeddings", "labels", "indices_tuple", "ref_emb", "ref_labels", "enqueue_mask", "enqueue_idx"}


class RemoteLoss(nn.Module):
    """A loss hosted by a server; call it as you would call the loss itself.

    Attributes:
        name: the session's.
        created: whether opening it created the session; if not, its bank and weights are those it had.
        timings: where the seconds of the last step went. Of the server: `queue` (until the session's turn), `decode`,
            `compute` and `encode`; here: `client_encode` and `client_decode`; and `network`, all that lies between.
    """

    def __init__(self, producer: Producer, loss: Loss, created: bool) -> None:
        super().__init__()
        self.producer, self.created, self.name = producer, created, producer.session
        self.timings: dict[str, float] = {}
        self._signature = inspect.signature(loss.forward)
        # in a tuple, so that its parameters and buffers are not this module's: they live on the server
        self._hosted = (loss,)
        self._optimizer: RemoteOptimizer | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a batch, with the arguments that the hosted loss takes.

        Raises:
            GradbankError: the step was refused or not answered in time; the session is then as it was, and calling
                again is safe.
        """
        begun = time.perf_counter()
        bound = self._signature.bind(*args, **kwargs).arguments
        step, payload, embeddings, ref_emb = self._request(bound)
        token = None
        if self._optimizer is not None:
            token = self._optimizer.token
            step.weights_need_gradient = torch.is_grad_enabled()
        encoded = time.perf_counter()
        output, data = self._step(step, payload)
        answered = time.perf_counter()
        reader = TensorReader(data)
        of_embeddings = reader.take(output.embeddings_gradient) if output.HasField("embeddings_gradient") else None
        of_ref = reader.take(output.ref_emb_gradient) if output.HasField("ref_emb_gradient") else None
        reader.finish()
        gradients = [of_embeddings, of_ref]
        at_server = seconds_of(output.timings)
        loss = torch.tensor(output.loss, dtype=torch_dtype(output.loss_dtype), device=embeddings.device)
        seen = None
        if self._optimizer is not None and step.weights_need_gradient:
            seen = (self._optimizer, output.seq)
            self._optimizer.will_keep(output.seq)
        made: Tensor = _Answered.apply(loss, seen, gradients, embeddings, ref_emb, token)  # type: ignore[no-untyped-call]
        self.timings = {
            "client_encode": encoded - begun,
            "network": max(answered - encoded - sum(at_server.values()), 0.0),
            **at_server,
            "client_decode": time.perf_counter() - answered,
        }
        return made

    def optimizer(self, name: str, **options: Any) -> RemoteOptimizer:
        """An optimizer of the loss's weights on the server, by its name in `torch.optim`: `optimizer("SGD", lr=0.01)`.

        Raises:
            InvalidRequest: no such optimizer or option, or a loss without weights.
            SessionConflict: the session has another optimizer.
        """
        if self._optimizer is not None and (self._optimizer.name, self._optimizer.options) != (name, options):
            raise SessionConflict(f"this loss has the optimizer {self._optimizer.name} already")
        made = self._optimizer or RemoteOptimizer(name, options)
        self.producer.configure(made.spec())
        self._optimizer = made
        return made

    @property
    def hosted(self) -> Loss:
        """What the server was asked to host, as it was here when it was opened."""
        return self._hosted[0]

    def flush(self) -> None:
        """Has the server carry out what the optimizer still has to tell it, without waiting for the next batch."""
        if self._optimizer is not None and self._optimizer.events:
            self._step(step_pb2.StepInput(), [])

    def local(self) -> Loss:
        """A copy of the hosted loss as it is on the server, weights and bank included, that computes here."""
        self.flush()
        copy = self.hosted.rebuilt()
        copy.load_state_dict(self.producer.pull())
        return copy

    def close(self) -> None:
        """Ends this trainer's stream of steps; the session lives on, and calling the loss opens another."""
        self.producer.close()

    def extra_repr(self) -> str:
        return f"{self.name!r} at rank {self.producer.rank}: {self.hosted}"

    def _step(self, step: step_pb2.StepInput, payload: list[memoryview]) -> tuple[step_pb2.StepOutput, Tensor]:
        """Has a step carried out, and with it what the optimizer has to tell."""
        return self.producer.step(step, payload, self._optimizer or _NoNews())

    def _request(self, bound: dict[str, Any]) -> tuple[step_pb2.StepInput, list[memoryview], Tensor, Tensor | None]:
        """The message of a call, its payload, and the two tensors that may want a gradient."""
        for argument in bound.keys() - _SENT:
            raise InvalidRequest(f"{argument} cannot be sent to a server: call the loss here, or without it")
        embeddings, labels, ref_emb = bound["embeddings"], bound.get("labels"), bound.get("ref_emb")
        # the wire cannot carry that two labels are one object, which says that reference i is anchor i
        ref_labels = None if bound.get("ref_labels") is labels else bound.get("ref_labels")
        # of labels only equality counts, so what the wire has no dtype for goes as a wider one
        labels, ref_labels = _widened(labels), _widened(ref_labels)
        payload: list[memoryview] = []
        step = step_pb2.StepInput()
        named = {"embeddings": embeddings, "labels": labels, "ref_emb": ref_emb, "ref_labels": ref_labels}
        for name, tensor in named.items():
            if tensor is not None:
                getattr(step, name).CopyFrom(_described(name, tensor, payload))
        indices = bound.get("indices_tuple")
        for i, index in enumerate((indices,) if isinstance(indices, Tensor) else indices or ()):
            step.indices.append(_described(f"indices_tuple[{i}]", index, payload))
        mask = _mask(bound)
        if mask is not None:
            step.enqueue_mask.CopyFrom(_described("enqueue_mask", mask, payload))
        if torch.is_grad_enabled():
            step.embeddings_need_gradient = embeddings.requires_grad
            step.ref_emb_needs_gradient = ref_emb is not None and ref_emb.requires_grad
        return step, payload, embeddings, ref_emb


class _NoNews:
    """Of a loss without an optimizer there is nothing to tell."""

    def __init__(self) -> None:
        self.events: list[step_pb2.WeightEvent] = []

    def drop(self, count: int) -> None:
        pass


class _Answered(torch.autograd.Function):
    """A loss whose gradients came with it."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        seen: tuple[RemoteOptimizer, int] | None,
        gradients: list[Tensor | None],
        embeddings: Tensor,
        ref_emb: Tensor | None,
        token: Tensor | None,
    ) -> Tensor:
        ctx.seen, inputs = seen, (embeddings, ref_emb)
        # as wide as they came: the scale that backward brings may be more than half precision holds
        ctx.save_for_backward(*(g if g is None or x is None else g.to(x.device) for g, x in zip(gradients, inputs)))
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        made = scaled(ctx.saved_tensors, grad_output, owned=True)  # by an answer that nobody else reads
        of_embeddings, of_ref = (None if g is None else g.to(dtype) for g, dtype in zip(made, ctx.dtypes))
        of_token = None
        if ctx.seen is not None:
            optimizer, seq = ctx.seen
            optimizer.saw(seq, float(grad_output))
            of_token = grad_output.to(optimizer.token)
        return None, None, None, of_embeddings, of_ref, of_token


def _described(name: str, tensor: object, payload: list[memoryview]) -> tensor_pb2.Tensor:
    """The message of an argument, whose bytes are added to the payload."""
    if not isinstance(tensor, Tensor):
        raise InvalidRequest(f"{name} must be a tensor, got {type(tensor).__name__}")
    message, data = describe(tensor)
    payload.append(data)
    return message


def _widened(labels: Any) -> Any:
    small = isinstance(labels, Tensor) and labels.dtype in (torch.uint8, torch.int8, torch.int16)
    return labels.long() if small else labels


def _mask(bound: dict[str, Any]) -> Tensor | None:
    """The mask that `enqueue_mask` or `enqueue_idx` means."""
    mask: Tensor | None = bound.get("enqueue_mask")
    positions = bound.get("enqueue_idx")
    if positions is None:
        return mask
    if mask is not None:
        raise InvalidRequest("enqueue_mask and enqueue_idx say the same: pass one of them")
    try:
        return enqueue_mask_of(positions, len(bound["embeddings"]))
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
