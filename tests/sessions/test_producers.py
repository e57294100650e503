"""Who holds a rank, and what that means for what was sent before."""

import pytest

from gradbank.errors import Fenced
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


def test_nobodys_nonce_renews_nothing() -> None:
    with pytest.raises(Fenced):
        Producer(0, NOBODY).attached(-1, b"a" * 16, b"")
