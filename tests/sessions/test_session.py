"""The protocol of a session: who may step, in which order, once each; and what a server may hold."""

import threading
import time
from collections.abc import Callable

import pytest
import torch

from gradbank import losses
from gradbank.errors import (
    Fenced,
    InvalidComponent,
    InvalidRequest,
    LimitExceeded,
    NonFiniteError,
    SessionConflict,
    SessionNotFound,
    StepConflict,
)
from gradbank.spec import Spec
from gradbank_server.build import build_loss
from gradbank_server.sessions import Batch, Limits, Sessions
from gradbank_server.storage import MemoryStorage

from .conftest import Trainer

Hosted = Callable[..., object]
Make = Callable[..., Batch]
NAN = float("nan")
HERE = torch.empty(0).device  # as --device has it


def memory(rows: int = 16, temperature: float = 0.07) -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.NTXentLoss(temperature), 8, rows)


def another(sessions: Sessions, storage: MemoryStorage, **limits: int) -> Sessions:
    """Sessions as they are after the process was started again, over the same storage."""
    return Sessions(build_loss, HERE, Limits(**limits), storage, lambda: 0.0)


# -- numbers and answers --------------------------------------------------------------------------------------------


def test_a_retried_step_is_answered_not_repeated(hosted: Hosted, batch: Make) -> None:
    trainer = hosted(memory())
    trainer.step(batch(1))
    second = trainer.step(batch(2))
    state = trainer.session.state()
    for _ in range(3):
        answer, replayed = trainer.send(2, batch(2))
        assert replayed
        assert answer is second
    after = trainer.session.state()
    assert all(torch.equal(state[name], after[name]) for name in state)
    assert (trainer.session.tally.steps, trainer.session.tally.replayed) == (2, 3)
    assert answer.bank_rows == 12


def test_a_number_cannot_be_used_for_another_batch(hosted: Hosted, batch: Make) -> None:
    trainer = hosted(memory())
    trainer.step(batch(1))
    with pytest.raises(StepConflict, match="step 1 was carried out with another batch"):
        trainer.send(1, batch(2))
    assert trainer.session.tally.steps == 1
    trainer.step(batch(2))


@pytest.mark.parametrize("seq", [0, 3, 7])
def test_a_gap_is_refused(hosted: Hosted, batch: Make, seq: int) -> None:
    trainer = hosted(memory())
    trainer.step(batch(1))
    with pytest.raises(StepConflict, match=r"the next step of rank 0 is 2"):
        trainer.send(seq, batch(seq))
    assert trainer.session.tally.steps == 1


def test_only_the_last_five_answers_are_kept(hosted: Hosted, batch: Make) -> None:
    trainer = hosted(memory())
    for seed in range(1, 7):
        trainer.step(batch(seed))
    for seq in (2, 3, 4, 5, 6):
        assert trainer.send(seq, batch(seq))[1]
    with pytest.raises(StepConflict, match=r"step 1 was carried out, and its answer is kept no longer: 5 are"):
        trainer.send(1, batch(1))


def test_a_failed_step_frees_its_number(hosted: Hosted, batch: Make) -> None:
    trainer, undisturbed = hosted(memory()), hosted(memory(), "undisturbed")
    bad = batch(1)
    bad.embeddings[[2, 4], 3] = NAN
    with pytest.raises(NonFiniteError, match=r"row 2 is not finite \(2 of 6 rows"):
        trainer.send(1, bad)
    with pytest.raises(InvalidRequest, match="labels must be"):
        trainer.send(1, Batch(embeddings=torch.zeros(6, 8), labels=torch.zeros(5, dtype=torch.int64)))
    assert trainer.session.tally.rejected == 2
    assert torch.equal(trainer.step(batch(1)).loss, undisturbed.step(batch(1)).loss)


def test_a_result_that_is_not_finite_is_refused(hosted: Hosted, batch: Make) -> None:
    trainer = hosted(losses.NTXentLoss(temperature=1e-39))
    with pytest.raises(NonFiniteError, match=r"the loss is (nan|inf); nothing was changed. The embeddings are finite"):
        trainer.send(1, batch(1))
    assert (trainer.session.tally.steps, trainer.session.tally.rejected) == (0, 1)


def test_two_ranks_count_for_themselves_and_share_one_bank(hosted: Hosted, batch: Make) -> None:
    first = hosted(memory(64))
    second = type(first)(first.session, rank=1)
    here = memory(64)
    for seed in range(4):
        for trainer in (first, second):
            made = batch(10 * seed + trainer.rank)
            assert torch.equal(trainer.step(made).loss, here(made.embeddings, made.labels))
    assert (first.seq, second.seq, first.session.tally.steps) == (4, 4, 8)
    assert first.session.ranks == [0, 1]


def test_a_rank_must_be_attached_before_it_steps(hosted: Hosted, batch: Make) -> None:
    trainer = hosted(memory())
    with pytest.raises(SessionNotFound, match=r"nobody is attached to rank 3 of session 'run': .* open it again"):
        trainer.session.step(3, 1, 1, 0, batch(1))


# -- trainers -------------------------------------------------------------------------------------------------------


def test_a_newer_trainer_takes_a_rank_over_and_the_older_one_is_fenced(hosted: Hosted, batch: Make) -> None:
    older = hosted(memory(), incarnation=1, nonce=b"a")
    older.step(batch(1))
    newer = type(older)(older.session, incarnation=2, nonce=b"b")
    assert newer.epoch > older.epoch
    assert newer.seq == 1
    for seq in (1, 2):  # what it did before is no longer answered either
        with pytest.raises(Fenced, match=r"another trainer took over rank 0 \(epoch \d+, this one has \d+\)"):
            older.send(seq, batch(seq))
    with pytest.raises(Fenced, match="held by a trainer that started later"):
        older.session.attach(0, 1, b"a")
    newer.step(batch(2))


def test_attaching_again_with_the_same_nonce_changes_nothing(hosted: Hosted, batch: Make) -> None:
    trainer = hosted(memory(), incarnation=5, nonce=b"a")
    trainer.step(batch(1))
    assert trainer.session.attach(0, 5, b"a") == (trainer.epoch, 1)
    trainer.step(batch(2))


@pytest.mark.parametrize("incarnation", [4, 5])
def test_a_trainer_that_did_not_start_later_is_refused(hosted: Hosted, batch: Make, incarnation: int) -> None:
    trainer = hosted(memory(), incarnation=5, nonce=b"a")
    with pytest.raises(Fenced):
        trainer.session.attach(0, incarnation, b"b")
    trainer.step(batch(1))


def test_fencing_survives_a_restart(hosted: Hosted, sessions: Sessions, storage: MemoryStorage, batch: Make) -> None:
    older = hosted(memory(), incarnation=1, nonce=b"a")
    newer = type(older)(older.session, incarnation=2, nonce=b"b")
    again, _ = another(sessions, storage).create("run", memory().spec(), {})
    with pytest.raises(Fenced):
        again.attach(0, 1, b"a")
    with pytest.raises(Fenced):
        again.step(0, older.epoch, 1, 0, batch(1))
    assert again.attach(0, 2, b"b") == (newer.epoch, 0)
    assert again.attach(0, 3, b"c").epoch > newer.epoch


def test_a_trainer_of_a_closed_session_stays_out_of_the_next_one_of_that_name(
    hosted: Hosted, sessions: Sessions, batch: Make
) -> None:
    older = hosted(memory(), incarnation=1, nonce=b"a")
    older.step(batch(1))
    assert sessions.close("run")
    newer = hosted(memory(), incarnation=2, nonce=b"b")
    newer.step(batch(2))
    with pytest.raises(Fenced):
        newer.session.step(0, older.epoch, 2, 0, batch(3))  # its next number, and its epoch


# -- sessions -------------------------------------------------------------------------------------------------------


def test_creating_a_session_again_finds_it_as_it_is(hosted: Hosted, sessions: Sessions, batch: Make) -> None:
    trainer = hosted(memory())
    trainer.step(batch(1))
    found, created = sessions.create("run", memory().spec(), {})
    assert found is trainer.session
    assert not created
    assert len(sessions) == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (memory(temperature=0.1), "loss.temperature is 0.07 there, and 0.1 here"),
        (memory(32), "memory_size is 16 there, and 32 here"),
        (losses.NTXentLoss(), "the loss is a CrossBatchMemory there, and a NTXentLoss here"),
        (losses.CrossBatchMemory(losses.TripletMarginLoss(), 8, 16), "loss is a NTXentLoss there"),
    ],
)
def test_a_name_that_is_taken_is_refused_with_the_difference(
    hosted: Hosted, sessions: Sessions, asked: losses.Loss, message: str
) -> None:
    hosted(memory())
    with pytest.raises(SessionConflict, match=message):
        sessions.create("run", asked.spec(), {})


def test_a_closed_session_is_not_found(hosted: Hosted, sessions: Sessions, batch: Make) -> None:
    trainer = hosted(memory())
    assert sessions.close("run")
    assert not sessions.close("run")
    for call in (lambda: sessions["run"], lambda: trainer.step(batch(1)), trainer.session.state):
        with pytest.raises(SessionNotFound, match="run"):
            call()
    assert sessions.all() == []


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "x" * 65, "ü", "a\n", "../etc"])
def test_a_name_that_cannot_be_is_refused(sessions: Sessions, name: str) -> None:
    with pytest.raises(InvalidRequest, match="a session's name has letters"):
        sessions.create(name, memory().spec(), {})


def test_no_more_sessions_than_allowed(hosted: Hosted, sessions: Sessions) -> None:
    for i in range(4):
        hosted(memory(), f"run-{i}")
    with pytest.raises(LimitExceeded, match=r"all 4 sessions are taken; close one, or .*--max-sessions"):
        hosted(memory(), "run-4")
    hosted(memory(), "run-3")  # this one exists
    sessions.close("run-0")
    hosted(memory(), "run-4")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (memory(26_215).spec(), r"memory_size=26215 .* 1,048,600 bytes .* the largest memory_size that fits is 26,214"),
        (losses.ArcFaceLoss(1, 8).spec()._replace(arguments={"num_classes": 10**12, "embedding_size": 8}), "classes="),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_allocated(sessions: Sessions, spec: Spec, message: str) -> None:
    with pytest.raises(LimitExceeded, match=message):
        sessions.create("run", spec, {})
    assert len(sessions) == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec("NTXentLos", {}), "no component is named 'NTXentLos'; did you mean 'NTXentLoss'"),
        (
            Spec("NTXentLoss", {"temprature": 1.0}),
            "NTXentLoss has no argument 'temprature'; did you mean 'temperature'",
        ),
        (Spec("NTXentLoss", {"temperature": "hot"}), "NTXentLoss.temperature: .* got 'hot'"),
        (Spec("CosineSimilarity", {}), "a session holds a loss, and CosineSimilarity is not one"),
        (Spec("CrossBatchMemory", {"embedding_size": 8}), "cannot be built: .*'loss'"),
        (Spec("CrossBatchMemory", {"embedding_size": 8, "loss": Spec("os.system", {})}), "no component is named"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(sessions: Sessions, spec: Spec, message: str) -> None:
    with pytest.raises(InvalidComponent, match=message):
        sessions.create("run", spec, {})
    assert len(sessions) == 0


FULL = memory()
FULL.add_to_memory(torch.ones(3, 8), torch.arange(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"V": torch.zeros(1)}, "the state has 'V', which CrossBatchMemory does not"),
        ({"embedding_memory": torch.zeros(16, 4)}, r"embedding_memory must have shape \(16, 8\), got \(16, 4\)"),
        ({"embedding_memory": torch.full((16, 8), NAN)}, "embedding_memory has entries that are not finite"),
        ({"queue_idx": torch.tensor(16)}, "queue_idx"),
        ({"queue_idx": torch.tensor(-1)}, "queue_idx"),
        ({"label_memory": torch.zeros(16)}, "label_memory"),
        ({"embedding_memory": torch.zeros(16, 8, dtype=torch.int64)}, "embedding_memory"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(sessions: Sessions, change: dict, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        sessions.create("run", memory().spec(), dict(FULL.state_dict()) | change)
    assert len(sessions) == 0


def test_half_a_bank_is_refused_not_dropped(sessions: Sessions) -> None:
    with pytest.raises(InvalidRequest, match="label_memory"):
        sessions.create("run", memory().spec(), {"embedding_memory": torch.ones(16, 8)})


def test_a_state_is_taken_over_bit_by_bit(sessions: Sessions) -> None:
    session, _ = sessions.create("run", memory().spec(), dict(FULL.state_dict()))
    expected, held = FULL.state_dict(), session.state()
    assert {name: value.tolist() for name, value in held.items()} == {n: v.tolist() for n, v in expected.items()}


def test_a_name_is_free_once_the_trainers_that_waited_for_its_session_are_refused(
    sessions: Sessions, storage: MemoryStorage
) -> None:
    session, _ = sessions.create("run", losses.ContrastiveLoss().spec(), {})
    refused: list[SessionNotFound] = []

    def attach() -> None:
        try:
            session.attach(0, 1, b"a")
        except SessionNotFound as error:
            refused.append(error)

    waiting = [threading.Thread(target=attach), threading.Thread(target=sessions.close, args=("run",))]
    with session._turn:  # as a step has it
        for each in waiting:
            each.start()
            time.sleep(0.05)
    for each in waiting:
        each.join(10)
    again, created = sessions.create("run", losses.ContrastiveLoss().spec(), {})
    assert created
    assert storage.producers("run") == {}, "who held the old session's ranks is remembered"
    assert again.ranks == []


def test_steps_of_a_session_are_never_computed_side_by_side(batch: Callable[..., Batch]) -> None:
    under_way, most = 0, 0

    def run(call: Callable[[], object]) -> object:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        time.sleep(0.01)
        made = call()
        under_way -= 1
        return made

    clock, limits = (lambda: 0.0), Limits()
    sessions = Sessions(build_loss, HERE, limits, MemoryStorage(), clock, run)  # type: ignore[arg-type]
    session, _ = sessions.create("run", losses.ContrastiveLoss().spec(), {})
    trainers = [Trainer(session, rank, nonce=bytes([rank])) for rank in range(4)]
    threads = [threading.Thread(target=lambda t=t: [t.step(batch(seed)) for seed in range(3)]) for t in trainers]
    for each in threads:
        each.start()
    for each in threads:
        each.join(20)
    assert session.tally.steps == 12
    assert most == 1
