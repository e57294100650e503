"""A loss that a server computes: one round trip brings its value and every gradient."""

import inspect
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradbank.engine.surroundings import uncompiled
from gradbank.errors import InvalidRequest, SessionConflict
from gradbank.memory import CrossBatchMemory
from gradbank.recorder import Statistics
from gradbank.remote.answer import Answered, gradients_of
from gradbank.remote.future import StepFuture
from gradbank.remote.hosted import Hosted, L_co
from gradbank.remote.optimizer import RemoteOptimizer
from gradbank.remote.producer import Producer
from gradbank.remote.request import Inputs, request_of
from gradbank.remote.ticket import NO_NEWS, News, Ticket
from gradbank.remote.transport import left_until
from gradbank.v1 import step_pb2
from gradbank.wire import seconds_of, seconds_of_both, torch_dtype


class RemoteLoss(Hosted[L_co]):
    """A loss hosted by a server; call it as you would call the loss itself.

    Its weights and its bank are the server's: they are not among this module's parameters nor in its `state_dict`, and
    `local` brings them here. It is a connection, so it can be neither copied nor pickled.

    Attributes:
        name: the session's.
        wire: the dtype that embeddings and gradients are rounded to on their way; None is not at all.
        created: whether opening it created the session; if not, its bank and weights are those it had.
        timings: where the seconds of the last step went. Of the server: `queue` (until the session's turn), `decode`,
            `compute` and `encode`; here: `client_encode` and `client_decode`; and `network`, all that lies between,
            which is left out of a submitted step that had others before it, or may have been answered before it was
            asked for.
    """

    def __init__(self, producer: Producer, loss: L_co, created: bool, wire: torch.dtype | None) -> None:
        super().__init__(loss, producer.tenure.session)
        self._signature, self._statistics = inspect.signature(loss.forward), Statistics(loss)
        self._optimizer: RemoteOptimizer | None = None
        self._untold: step_pb2.TrainerTimings | None = None  # of the last step, for the server's statistics
        self.producer, self.created, self.wire = producer, created, wire
        self.timings: dict[str, float] = {}
        # in a tuple, so that its parameters and buffers are not this module's: they live on the server
        self._hosted = (loss,)

    if TYPE_CHECKING:  # a module's gives anything

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...

    @uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of a batch, with the arguments that the hosted loss takes.

        Raises:
            GradbankError: the step was refused or not answered in time; the session is then as it was, and calling
                again is safe.
        """
        call, ticket, deadline = self._call(args, kwargs), None, self.producer.deadline()
        try:
            ticket = self.producer.submit(call.step, call.payload, self._news, deadline)
            return self._loss(call, ticket, deadline)
        except BaseException as error:
            self.producer.abandon(ticket, error)
            raise

    def submit(self, *args: Any, **kwargs: Any) -> StepFuture:
        """Sends a batch, with the arguments that the hosted loss takes, and does not wait for its loss.

        Up to four may be in flight; the next call waits for the first of them. They are carried out in the order in
        which they were submitted, whatever the order in which their results are asked for. The batch's tensors may not
        be written to until then.

        Raises:
            GradbankError: it was not sent.
            InvalidRequest: a loss with an optimizer here, of which each step tells the server.
        """
        if self.learns:
            raise InvalidRequest(
                "a loss whose weights are learned by loss_fn.optimizer is called, not submitted: each step tells the "
                "server of the ones before it"
            )
        call, ticket = self._call(args, kwargs), None
        try:
            ticket = self.producer.submit(call.step, call.payload, self._news, self.producer.deadline())
            return StepFuture(partial(self._loss, call, ticket), self.producer.transport)
        except BaseException as error:
            self.producer.abandon(ticket, error)
            raise

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Call":
        """What is to be sent for a call, and what is to be known once it is answered."""
        begun = time.perf_counter()
        step, payload, inputs = request_of(self._signature.bind(*args, **kwargs).arguments, self.wire)
        if self._optimizer is not None:
            step.weights_need_gradient = torch.is_grad_enabled()
        elif self._trains and step.embeddings_need_gradient:
            self._warn(
                f"the weights of this {type(self.hosted).__name__} are the server's, and nobody trains them here: give "
                'it an optimizer, as in loss_fn.optimizer("SGD", lr=0.01), or freeze them with requires_grad_(False) '
                "before client.open"
            )
        untold, self._untold = self._untold, None
        if untold is not None:
            step.trainer_timings.CopyFrom(untold)
        encoded = time.perf_counter()
        return _Call(step, payload, inputs, torch.is_grad_enabled(), encoded - begun, encoded)

    @property
    def _news(self) -> News:
        return self._optimizer or NO_NEWS

    def _loss(self, call: "_Call", ticket: Ticket, deadline: float | None = None) -> Tensor:
        """The loss of a step, once it is answered, which backpropagates to the inputs if the call was recorded."""
        asked = time.perf_counter()
        output, data = self.producer.result(ticket, self.producer.deadline() if deadline is None else deadline)
        answered = time.perf_counter()
        # who did something else for longer than he waits now may have found the answer there
        waited = deadline is not None or asked - call.sent <= answered - asked
        alone = ticket.step.seq == ticket.step.answered_seq + 1  # or it waited for others on its way
        embeddings, ref_emb = call.inputs
        gradients = gradients_of(output, data)
        self._statistics.write(output.statistics)
        loss = torch.tensor(output.loss, dtype=torch_dtype(output.loss_dtype), device=embeddings.device)
        seen, token = None, None
        if self._optimizer is not None:
            token = self._optimizer.token
            if ticket.step.weights_need_gradient:
                seen = (self._optimizer, output.seq)
        with torch.set_grad_enabled(call.recorded):
            made: Tensor = Answered.apply(loss, seen, gradients, embeddings, ref_emb, token)  # type: ignore[no-untyped-call]  # torch's
        self._untold = step_pb2.TrainerTimings(
            client_encode_s=call.encode_s,
            network_s=max(answered - call.sent - sum(seconds_of(output.timings).values()), 0.0)
            if waited and alone
            else None,
            client_decode_s=time.perf_counter() - answered,
        )
        self.timings = seconds_of_both(self._untold, output.timings)
        return made

    def optimizer(self, name: str, **options: Any) -> RemoteOptimizer:
        """An optimizer of the loss's weights on the server, by its name in `torch.optim`: `optimizer("SGD", lr=0.01)`.

        Raises:
            InvalidRequest: no such optimizer or option, a loss without weights, or with frozen ones.
            SessionConflict: the session has another optimizer.
        """
        asked, known = RemoteOptimizer(name, options), self._optimizer
        if known is not None and (known.name, known.defaults) != (name, asked.defaults):
            raise SessionConflict(
                f"this loss has the optimizer {known.name}({known.options}) already, not {name}({options}): to go on "
                'with others, set those of optimizer.param_groups[0], as in param_groups[0]["lr"] = 0.05'
            )
        frozen = [name for name, weight in self.hosted.named_parameters() if not weight.requires_grad]
        if frozen:
            raise InvalidRequest(
                f"{', '.join(frozen)} requires no gradient here, and the server would step all weights of the loss: "
                "thaw it with requires_grad_(), or host what is frozen as a loss of its own"
            )
        made = known or asked
        self.producer.tenure.configure(made.spec(), self.producer.timeout)
        self._optimizer = made
        return made

    @property
    def learns(self) -> bool:
        """Whether there is an optimizer here, of which each step tells the server."""
        return self._optimizer is not None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zeroes the gradients of the weights on the server, as `zero_grad` of their optimizer does."""
        super().zero_grad(set_to_none)
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none)

    def flush(self, timeout: float | None = None) -> None:
        """Has the server carry out what the optimizer still has to tell it, without waiting for the next batch.

        Args:
            timeout: seconds that this may take; None is as long as the client gives any call.
        """
        if self._optimizer is not None and self._optimizer.events:
            deadline = self.producer.deadline(timeout)
            self.producer.result(self.producer.submit(step_pb2.StepInput(), [], self._optimizer, deadline), deadline)

    def reset_queue(self) -> None:
        """Empties the queue of the hosted loss, for all ranks: once, as any step, and after those in flight.

        Raises:
            InvalidRequest: a loss without a queue.
        """
        deadline, step, ticket = self.producer.deadline(), step_pb2.StepInput(resets_queue=True), None
        try:
            ticket = self.producer.submit(step, [], self._news, deadline)
            self.producer.result(ticket, deadline)
        except BaseException as error:
            self.producer.abandon(ticket, error)
            raise

    def add_to_memory(self, embeddings: Tensor, labels: Tensor, batch_size: int | None = None) -> None:
        """Enters rows into the hosted queue without comparing them: `(N, D)` and `(N,)`.

        Raises:
            InvalidRequest: a loss other than a `CrossBatchMemory`.
        """
        if not isinstance(self.hosted, CrossBatchMemory):
            raise InvalidRequest(
                f"rows enter the queue of a CrossBatchMemory, and this is {self.hosted.spec().title()}"
            )
        with torch.no_grad():
            self(embeddings, labels, enqueue_mask=torch.ones(len(embeddings), dtype=torch.bool))
        self._untold = None  # these are no times of a step

    def local(self) -> L_co:
        """A copy of the hosted loss as it is on the server, weights and bank included, that computes here."""
        deadline = self.producer.deadline()
        self.flush(left_until(deadline))
        copy = self.hosted.rebuilt()
        copy.take_state(self.producer.tenure.pull(left_until(deadline)))
        return copy

    def close(self) -> None:
        """Ends this trainer's stream of steps; the session lives on, and calling the loss opens another."""
        self.producer.close()

    def retire(self) -> None:
        """Closes it for good: another loss has its session and rank."""
        if self._optimizer is not None:
            self._optimizer.retired = True
        self.close()

    def extra_repr(self) -> str:
        rounded = "" if self.wire is None else f", in {self.wire} on the wire"
        return f"{self.name!r} at rank {self.producer.tenure.rank}{rounded}: {self.hosted}"


class _Call(NamedTuple):
    """A call of a loss, ready to be sent: whether gradients were recorded, how long it took to encode, and since when
    it is on its way."""

    step: step_pb2.StepInput
    payload: list[memoryview]
    inputs: Inputs
    recorded: bool
    encode_s: float
    sent: float
