"""A loss and all that it remembers: its steps run one at a time, each as a whole or not at all."""

import secrets
import threading
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from gradbank.bank import Bank
from gradbank.errors import (
    GradbankError,
    InvalidRequest,
    LimitExceeded,
    SessionConflict,
    SessionNotFound,
    StepConflict,
)
from gradbank.losses.loss import Loss
from gradbank.memory import CrossBatchMemory
from gradbank.recorder import Statistics
from gradbank.spec import Spec
from gradbank_server.sessions.arguments import Signature
from gradbank_server.sessions.batch import Answer, Batch, OptimizerSpec, Outcome
from gradbank_server.sessions.learner import Learner, Update
from gradbank_server.sessions.producers import Attachment, Producer
from gradbank_server.sessions.results import check_number, check_result, gradients_of, refusal_of
from gradbank_server.sessions.tally import Tally
from gradbank_server.storage import ProducerRecord, Storage

T = TypeVar("T")
Clock = Callable[[], float]


class Run(Protocol):
    """Has a call made, in whichever thread is best, and gives what it gave."""

    def __call__(self, call: Callable[[], T], /) -> T: ...


def here(call: Callable[[], T]) -> T:
    """In the calling thread."""
    return call()


MOST_RANKS = 256  # each keeps a few answers and weight gradients


class Session:
    """A named loss on a device.

    A step is atomic. Whatever can fail (the arithmetic, the checks, a step of the optimizer) happens beside what is
    in use: the batch waits beside the bank, new weights are made beside the old. Then it is committed, which puts
    references and integers in place.

    Args:
        loss: on `device` already; the session owns it from now on.
        spec: what it was built from.
        clock: seconds that never go back.
        run: has steps computed.

    Attributes:
        banks: those of the loss, and of the losses within it.
    """

    def __init__(
        self,
        name: str,
        loss: Loss,
        spec: Spec,
        device: torch.device,
        storage: Storage,
        clock: Clock,
        run: Run = here,
    ) -> None:
        self.name, self.loss, self.spec = name, loss, spec
        self._storage, self._clock, self._run = storage, clock, run
        self._learner, self._statistics = Learner(loss), Statistics(loss)
        self.banks = banks_of(loss)
        self._signature = Signature(loss, spec, device)
        self._producers = {r: Producer(r, record) for r, record in storage.producers(name).items()}
        # random, so that a trainer of an earlier session of this name cannot step in this one
        self._nobody = ProducerRecord(epoch=secrets.randbits(48), incarnation=-1, nonce=b"")
        self._turn = threading.RLock()
        self.closed = False
        self.tally, self._tallying = Tally(created=clock()), threading.Lock()

    def attach(self, rank: int, incarnation: int, nonce: bytes, previous_nonce: bytes = b"") -> Attachment:
        """Makes a trainer the producer of a rank; see `Producer.attached`.

        Raises:
            Fenced: a trainer that started later holds the rank.
            LimitExceeded: too many ranks.
        """
        with self._turn:
            self._check_open()
            if rank not in self._producers and len(self._producers) >= MOST_RANKS:
                raise LimitExceeded(f"session {self.name!r} has {MOST_RANKS} ranks, and no session may have more")
            producer = self._producers.get(rank) or Producer(rank, self._nobody)
            held, record = producer.record, producer.attached(incarnation, nonce, previous_nonce)
            if record != held:
                self._storage.put_producer(self.name, rank, record)  # safe before the trainer is told
                producer.record = record
                if held.incarnation != incarnation:  # another trainer, which has called no backward yet
                    self._learner.forget(rank)
            self._producers[rank] = producer
            return Attachment(record.epoch, producer.last_seq)

    def step(self, rank: int, epoch: int, seq: int, digest: int, batch: Batch) -> Outcome:
        """Carries a step out, or answers it again.

        Args:
            rank, epoch: from `attach`.
            seq: one more than the rank's last.
            digest: of what was sent; a step sent again has the same.

        Raises:
            GradbankError: of the class that fits; the session is as it was.
        """
        asked = self._clock()
        with self._turn:
            waited = self._clock() - asked
            self._check_open()
            try:
                producer = self._producers.get(rank)
                if producer is None:
                    raise SessionNotFound(
                        f"nobody is attached to rank {rank} of session {self.name!r}: attach to it first, or, if that "
                        "was done, the session ended and another has its name now; open it again"
                    )
                stored = producer.recall(epoch, seq, digest)
                if stored is not None:
                    self.tally.replayed += 1
                    return Outcome(stored, True, waited)
                producer.forget(batch.answered)  # now, for they may be as large as what is to come
                # at its turn, not before: steps of one session would only take threads from one another
                answer, optimizer_steps = self._run(lambda: self._carried_out(producer, seq, digest, batch))
            except (GradbankError, ValueError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
                refusal = refusal_of(error)
                if refusal is None:
                    raise
                self.tally.rejected += not isinstance(refusal, StepConflict)  # which is nothing of the batch's
                try:
                    if refusal is error:
                        raise
                    raise refusal from error
                finally:
                    del refusal  # which leads to this frame, and this frame to the batch
            self.tally.optimizer_steps += optimizer_steps
            loss = answer.value if batch.compares else None
            self.tally.stepped(loss, answer.statistics, self._clock())
            return Outcome(answer, False, waited)

    def has_carried_out(self, rank: int, epoch: int, seq: int) -> bool:
        """Whether that step was, if it was the session's: what failed then came after it."""
        with self._turn:
            producer = self._producers.get(rank)
            return producer is not None and producer.record.epoch == epoch and producer.last_seq >= seq

    def timed(self, seconds: dict[str, float], received: int, sent: int) -> None:
        """Counts what a step took, which is known when its turn is over and that of another may have begun."""
        with self._tallying:
            self.tally.timed(seconds, received, sent)

    def configure(self, spec: OptimizerSpec) -> OptimizerSpec:
        """Gives the weights an optimizer; asking again for the same is answered with the one there is.

        Raises:
            InvalidRequest: no such optimizer or option, or no weights.
            SessionConflict: it has another one.
        """
        with self._turn:
            self._check_open()
            known = self._learner.spec
            if known is None:
                self._learner.configure(spec)
            elif known.name != spec.name or self._learner.configured(spec).defaults != self._learner.defaults:
                raise SessionConflict(
                    f"session {self.name!r} has the optimizer {known.name}({known.options}), not "
                    f"{spec.name}({spec.options}): to go on with other options, ask for those that it has and set "
                    'optimizer.param_groups[0], as in param_groups[0]["lr"] = 0.05'
                )
            return spec

    def state(self) -> dict[str, Tensor]:
        """Copies of the weights and of the bank with its cursor, as in torch's state_dict."""
        with self._turn:
            self._check_open()
            return {name: value.detach().cpu().clone() for name, value in self.loss.state_dict().items()}

    def close(self) -> None:
        with self._turn:
            self.closed = True

    def wait(self, seconds: float) -> bool:
        """Waits until no step is under way; whether that came to pass in time."""
        idle = self._turn.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))
        if idle:
            self._turn.release()
        return idle

    @property
    def ranks(self) -> list[int]:
        return sorted(self._producers)

    @property
    def optimizer(self) -> OptimizerSpec | None:
        return self._learner.spec

    @property
    def bank_rows(self) -> int:
        """How many rows all banks hold together."""
        return sum(len(bank) for bank in self.banks)

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self._learner.weights)

    @property
    def gradient_bytes(self) -> int:
        """What is kept of the weights' gradients: of each rank at most four steps' and their sum."""
        return self._learner.gradient_bytes

    def _carried_out(self, producer: Producer, seq: int, digest: int, batch: Batch) -> tuple[Answer, int]:
        """The answer of the step that is next, and how many steps of the optimizer it told of."""
        with self._learner.stage(producer.rank, batch.weight_events) as update:
            answer = self._answered(batch, update, seq)
            producer.remember(seq, digest, answer)
        return answer, update.optimizer_steps

    def _answered(self, batch: Batch, update: Update, seq: int) -> Answer:
        """Computes a step with the updated weights, and commits it."""
        if batch.embeddings is None:
            if batch.resets_queue and not self.banks:
                raise InvalidRequest(f"{self.spec.title()} has no queue that could be emptied")
            update.commit()
            for bank in self.banks if batch.resets_queue else ():
                bank.reset()
            return Answer.nothing(self.bank_rows)
        given = self._signature.arguments(batch)
        weights = self._learner.weights if batch.weights_need_gradient else []
        with torch.set_grad_enabled(bool(given.wanted or weights)):
            # views, for trackers of modules hook what these are called with, which a leaf that is asked for is not
            views = {name: each.view_as(each) for name, each in given.others.items() if name == "ref_emb"}
            staged = self.loss.stage(given.embeddings.view_as(given.embeddings), **{**given.others, **views})
        check_number(staged.loss, self.spec)
        made, of_weights = gradients_of(staged.loss, given.wanted, weights)
        gradients = iter(made)
        answer = Answer(
            staged.loss.detach().cpu(),
            staged.loss.item(),
            next(gradients).cpu() if batch.embeddings_need_gradient else None,
            next(gradients).cpu() if batch.ref_emb is not None and batch.ref_emb_needs_gradient else None,
            0,
            self._statistics.read(),
        )
        check_result(answer, of_weights)
        if weights:
            update.keep(seq, of_weights)
        staged.commit()
        update.commit()
        return answer._replace(bank_rows=self.bank_rows)

    def _check_open(self) -> None:
        if self.closed:
            raise SessionNotFound(f"session {self.name!r} was closed")


def banks_of(loss: nn.Module) -> list[Bank]:
    """Those of the queues that a loss is, or has within it."""
    return [module.bank for module in loss.modules() if isinstance(module, CrossBatchMemory)]
