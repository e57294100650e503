"""Whatever trainers do, in whatever order: a session and its bank agree with a model made of plain lists."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gradbank import losses
from gradbank.errors import Fenced, NonFiniteError, SessionConflict, SessionNotFound, StepConflict
from gradbank_server.build import build_loss
from gradbank_server.sessions import Batch, Limits, Sessions
from gradbank_server.storage import MemoryStorage

SLOTS, KEPT, RANKS = 7, 5, (0, 1)
HERE = torch.empty(0).device  # as --device has it


class Model:
    """A session as its contract says: who may step, what comes next, and which rows are in the bank."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = [(0, 0)] * SLOTS
        self.cursor = self.steps = self.replayed = self.rejected = 0
        self.filled = False
        self.holder: dict[int, tuple[int, int]] = {}  # (incarnation, epoch) of each rank
        self.answers: dict[int, list[tuple[int, float]]] = {}  # (digest, loss) of each step of each rank

    def attach(self, rank: int, incarnation: int) -> type[Exception] | None:
        held = self.holder.get(rank, (-1, 0))[0]
        return None if incarnation >= held else Fenced

    def judge(self, rank: int, epoch: int, seq: int, digest: int) -> type[Exception] | str:
        if rank not in self.holder:
            return SessionNotFound
        if epoch != self.holder[rank][1]:
            return Fenced
        done = self.answers.setdefault(rank, [])
        if seq == len(done) + 1:
            return "next"
        if not len(done) - KEPT < seq <= len(done) or seq < 1 or done[seq - 1][0] != digest:
            return StepConflict
        return "stored"

    def enter(self, made: list[tuple[int, int]]) -> None:
        for row in made:
            self.rows[self.cursor] = row
            self.cursor += 1
            if self.cursor == SLOTS:
                self.cursor, self.filled = 0, True

    def __len__(self) -> int:
        return SLOTS if self.filled else self.cursor


def spec(temperature: float = 0.5) -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(temperature), 2, SLOTS)


def batch_of(made: list[tuple[int, int]]) -> Batch:
    rows = torch.tensor([[float(place), 8.0] for place, _ in made])
    return Batch(rows, torch.tensor([label for _, label in made], dtype=torch.int64), embeddings_need_gradient=True)


ROWS = st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 2)), min_size=1, max_size=SLOTS)


class Machine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.storage, self.numbers = MemoryStorage(), itertools.count(1)
        self.sessions = Sessions(build_loss, HERE, Limits(), self.storage, lambda: 0.0)
        self.model: Model | None = None
        self.given: set[tuple[int, int]] = set()
        self.create()

    @rule()
    def create(self) -> None:
        created = self.sessions.create("run", spec().spec(), {})[1]
        assert created == (self.model is None)
        if created:
            self.model, self.twin = Model(), spec()

    @rule()
    def create_another_of_that_name(self) -> None:
        if self.model is not None:
            with pytest.raises(SessionConflict):
                self.sessions.create("run", spec(0.25).spec(), {})

    @rule(rank=st.sampled_from(RANKS))
    def attach(self, rank: int) -> None:
        incarnation = next(self.numbers)
        if self.model is None:
            with pytest.raises(SessionNotFound):
                self.sessions["run"]
            return
        epoch, last = self.sessions["run"].attach(rank, incarnation, b"%d" % incarnation)
        assert last == len(self.model.answers.get(rank, []))
        assert (rank, epoch) not in self.given, "an epoch is given once, even if the session was closed in between"
        self.given.add((rank, epoch))
        self.model.holder[rank] = (incarnation, epoch)

    @rule(rank=st.sampled_from(RANKS), back=st.integers(0, 2))
    def attach_again_or_late(self, rank: int, back: int) -> None:
        if self.model is None or rank not in self.model.holder:
            return
        incarnation, epoch = self.model.holder[rank]
        if back:
            with pytest.raises(Fenced):
                self.sessions["run"].attach(rank, incarnation - back, b"late")
        else:
            assert self.sessions["run"].attach(rank, incarnation, b"%d" % incarnation)[0] == epoch

    @rule(
        rank=st.sampled_from(RANKS),
        stale=st.integers(0, 9),
        offset=st.sampled_from([1] * 6 + [-5, -4, -3, 0, 0, 2, 3]),
        made=ROWS,
        same=st.booleans(),
        bad=st.integers(0, 7),
    )
    def step(self, rank: int, stale: int, offset: int, made: list, same: bool, bad: int) -> None:
        """The next step, or one before or after it; with the batch that number had, or another; maybe a NaN; mostly
        by the trainer that holds the rank."""
        model = self.model
        if model is None:
            with pytest.raises(SessionNotFound):
                self.sessions["run"]
            return
        others = sorted(epoch for of, epoch in self.given if of == rank)
        epoch = others[stale % len(others)] if others and stale < 2 else model.holder.get(rank, (0, 0))[1]
        done = model.answers.get(rank, [])
        seq = max(len(done) + offset, 0)
        digest = done[seq - 1][0] if same and 0 < seq <= len(done) else hash(tuple(made))
        verdict, batch, session = model.judge(rank, epoch, seq, digest), batch_of(made), self.sessions["run"]
        if bad == 0:
            batch.embeddings[-1, 0] = float("nan")
        if verdict == "stored":
            answer, replayed = session.step(rank, epoch, seq, digest, batch)[:2]
            assert replayed
            assert answer.loss.item() == done[seq - 1][1]
            model.replayed += 1
        elif verdict == "next" and bad:
            answer, replayed = session.step(rank, epoch, seq, digest, batch)[:2]
            assert not replayed
            assert torch.equal(answer.loss, self.twin(batch.embeddings, batch.labels))
            model.enter(made)
            model.answers[rank].append((digest, answer.loss.item()))
            model.steps += 1
            assert answer.bank_rows == len(model)
        else:
            with pytest.raises(NonFiniteError if verdict == "next" else verdict):  # type: ignore[arg-type]
                session.step(rank, epoch, seq, digest, batch)
            model.rejected += 1

    @rule(batches=st.lists(ROWS, min_size=1, max_size=KEPT + 2), rank=st.sampled_from(RANKS))
    def go_on(self, batches: list[list], rank: int) -> None:
        """Some steps in a row."""
        if self.model is not None and rank in self.model.holder:
            for made in batches:
                self.step(rank, 9, 1, made, False, 1)

    @rule(sure=st.integers(0, 7))
    def close(self, sure: int) -> None:
        if sure == 0:
            assert self.sessions.close("run") == (self.model is not None)
            self.model = None

    @invariant()
    def agree(self) -> None:
        if getattr(self, "model", None) is None:
            return
        model, session = self.model, self.sessions["run"]
        counts = (session.tally.steps, session.tally.replayed, session.tally.rejected)
        assert counts == (model.steps, model.replayed, model.rejected)
        bank = session.banks[0]
        assert bank is not None
        assert (len(bank), bank.cursor, bank.is_full) == (len(model), model.cursor, model.filled)
        if model.steps % 3 == 0:  # reading settles the rows that wait: not after every step
            state, held = session.state(), len(model)
            expected = batch_of(model.rows)
            assert torch.equal(state["embedding_memory"][:held], expected.embeddings[:held])
            assert torch.equal(state["label_memory"][:held], expected.labels[:held])


TestSessionAgreesWithAModelOfPlainLists = Machine.TestCase
TestSessionAgreesWithAModelOfPlainLists.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=[Phase.generate],  # a failure is printed as it was found: making it smaller takes minutes
    derandomize=True,
)
