"""What is stored, and the interface that stores it."""

from typing import NamedTuple, Protocol


class ProducerRecord(NamedTuple):
    """Who holds a rank of a session. Stored before a trainer is told that it does: a trainer that was taken over
    must stay out, whatever happens to the server."""

    epoch: int
    incarnation: int
    nonce: bytes


class Storage(Protocol):
    """Producers of sessions, by session and rank."""

    def producers(self, session: str) -> dict[int, ProducerRecord]:
        """The producers of a session, by rank; none if it is not known."""
        ...

    def put_producer(self, session: str, rank: int, record: ProducerRecord) -> None:
        """Stores the holder of a rank, in place of the one before."""
        ...

    def drop(self, session: str) -> None:
        """Forgets a session that was closed on purpose."""
        ...
