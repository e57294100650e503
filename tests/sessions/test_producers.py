"""Who holds a rank, and what that means for what was sent before."""

import pytest
import torch

from gradbank.errors import Fenced, StepConflict
from gradbank_server.sessions import Answer
from gradbank_server.sessions.producers import Producer
from gradbank_server.storage import ProducerRecord

NOBODY = ProducerRecord(epoch=40, incarnation=-1, nonce=b"")


def held(producer: Producer, incarnation: int, nonce: bytes, previous: bytes = b"") -> ProducerRecord:
    producer.record = producer.attached(incarnation, nonce, previous)
    return producer.record


def test_a_holder_that_renews_fences_its_own_earlier_steps() -> None:
    producer = Producer(0, NOBODY)
    first = held(producer, 5, b"a" * 16)
    renewed = held(producer, 5, b"b" * 16, previous=b"a" * 16)
    assert renewed.epoch == first.epoch + 1
    with pytest.raises(Fenced):
        producer.recall(first.epoch, 1, digest=0)
    assert producer.recall(renewed.epoch, 1, digest=0) is None


def test_renewing_twice_with_the_same_nonce_is_renewing_once() -> None:
    producer = Producer(0, NOBODY)
    held(producer, 5, b"a" * 16)
    renewed = held(producer, 5, b"b" * 16, previous=b"a" * 16)
    assert producer.attached(5, b"b" * 16, b"a" * 16) == renewed


def test_one_that_was_taken_over_cannot_renew() -> None:
    producer = Producer(0, NOBODY)
    held(producer, 5, b"a" * 16)
    held(producer, 6, b"c" * 16)
    with pytest.raises(Fenced, match="held by a trainer that started later"):
        producer.attached(5, b"b" * 16, b"a" * 16)


def answer(value: float) -> Answer:
    return Answer(torch.tensor(value), value, None, None, 0, {})


def test_answers_are_kept_until_the_trainer_says_that_it_has_them() -> None:
    producer = Producer(0, NOBODY)
    for seq in range(1, 5):
        producer.remember(seq, seq, answer(seq))
    producer.forget(0)
    assert [producer.recall(40, seq, seq) for seq in range(1, 5)] == [answer(seq) for seq in range(1, 5)]
    producer.forget(2)
    assert [producer.recall(40, seq, seq) for seq in (3, 4)] == [answer(3), answer(4)]
    for seq in (1, 2):
        with pytest.raises(StepConflict, match="its answer is kept no longer"):
            producer.recall(40, seq, seq)


def test_the_last_five_answers_are_kept_for_a_trainer_that_says_nothing() -> None:
    producer = Producer(0, NOBODY)
    for seq in range(1, 9):
        producer.remember(seq, seq, answer(seq))
    assert [producer.recall(40, seq, seq) for seq in range(4, 9)] == [answer(seq) for seq in range(4, 9)]
    with pytest.raises(StepConflict, match="its answer is kept no longer"):
        producer.recall(40, 3, 3)


def test_a_trainer_that_has_more_than_was_given_loses_what_was() -> None:
    producer = Producer(0, NOBODY)
    producer.remember(1, 1, answer(1))
    producer.forget(2**60)
    producer.remember(2, 2, answer(2))
    assert producer.recall(40, 2, 2) == answer(2)


def test_nobodys_nonce_renews_nothing() -> None:
    with pytest.raises(Fenced):
        Producer(0, NOBODY).attached(-1, b"a" * 16, b"")
