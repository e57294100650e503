"""Storage that lives as long as the process."""

from gradbank_server.storage.records import ProducerRecord


class MemoryStorage:
    """Producers in a dictionary."""

    def __init__(self) -> None:
        self._producers: dict[str, dict[int, ProducerRecord]] = {}

    def producers(self, session: str) -> dict[int, ProducerRecord]:
        return dict(self._producers.get(session, {}))

    def put_producer(self, session: str, rank: int, record: ProducerRecord) -> None:
        self._producers.setdefault(session, {})[rank] = record

    def drop(self, session: str) -> None:
        self._producers.pop(session, None)
