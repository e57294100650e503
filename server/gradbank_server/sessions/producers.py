"""Who may step, which step comes next, and the answers that are kept for a step sent again."""

from collections import OrderedDict
from typing import NamedTuple

from gradbank.errors import Fenced, StepConflict
from gradbank.protocol import WINDOW
from gradbank_server.sessions.batch import Answer
from gradbank_server.storage import ProducerRecord

ANSWERS_KEPT = WINDOW + 1  # fewer than the window, and a retry could find its answer gone


class Attachment(NamedTuple):
    """What a trainer must know to step."""

    epoch: int
    last_seq: int


class Producer:
    """One rank of a session. Its steps are numbered from 1, without gaps, and each is carried out once."""

    def __init__(self, rank: int, record: ProducerRecord) -> None:
        self.rank, self.record = rank, record
        self.last_seq = 0
        self._answers: OrderedDict[int, tuple[int, Answer]] = OrderedDict()

    def attached(self, incarnation: int, nonce: bytes, previous_nonce: bytes = b"") -> ProducerRecord:
        """The record that holds once this trainer is attached; the same one, if it already is.

        A trainer that holds the rank, and shows the nonce it holds it by, gets a new epoch: nothing that it sent before
        can be carried out from then on.

        Raises:
            Fenced: a trainer that started later holds the rank.
        """
        held = self.record
        if nonce == held.nonce:
            return held
        if incarnation <= held.incarnation and not (held.nonce and previous_nonce == held.nonce):
            raise Fenced(
                f"rank {self.rank} is held by a trainer that started later, or just then; give each trainer a rank of "
                "its own, or stop one of them (if the clock of its machine was ahead, close the session)"
            )
        return ProducerRecord(held.epoch + 1, incarnation, nonce)

    def recall(self, epoch: int, seq: int, digest: int) -> Answer | None:
        """The answer of a step that was carried out already; None if this one is next.

        Raises:
            Fenced: the epoch is no longer the rank's.
            StepConflict: a gap, an answer that is no longer kept, or another batch under the same number.
        """
        if epoch > self.record.epoch:
            raise Fenced(
                f"rank {self.rank} is in epoch {self.record.epoch}, and {epoch} is to come: attach to it first"
            )
        if epoch != self.record.epoch:
            raise Fenced(
                f"another trainer took over rank {self.rank} (epoch {self.record.epoch}, this one has {epoch}); "
                "give each trainer a rank of its own, or open the session again to take it back"
            )
        if seq == self.last_seq + 1:
            return None
        if seq in self._answers:
            known, answer = self._answers[seq]
            if known != digest:
                raise StepConflict(f"step {seq} was carried out with another batch; its number cannot be used again")
            return answer
        if not seq:
            raise StepConflict(f"steps are numbered from 1: the next step of rank {self.rank} is {self.last_seq + 1}")
        if seq <= self.last_seq:
            raise StepConflict(
                f"step {seq} was carried out, and its answer is kept no longer: {ANSWERS_KEPT} are, and none that the "
                f"trainer said it has (the last step is {self.last_seq})"
            )
        raise StepConflict(f"step {seq} leaves a gap: the next step of rank {self.rank} is {self.last_seq + 1}")

    def forget(self, answered: int) -> None:
        """Lets go of the answers up to that step, which the trainer has."""
        while self._answers and next(iter(self._answers)) <= answered:
            self._answers.popitem(last=False)

    def remember(self, seq: int, digest: int, answer: Answer) -> None:
        self._answers[seq] = (digest, answer)
        self.last_seq = seq
        while len(self._answers) > ANSWERS_KEPT:
            self._answers.popitem(last=False)
