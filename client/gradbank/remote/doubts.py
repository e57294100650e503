"""The steps of a trainer that were sent and never answered."""

from collections.abc import Iterator
from typing import NamedTuple

from gradbank.remote.ticket import NO_NEWS, News, Ticket
from gradbank.v1 import step_pb2


class _Doubt(NamedTuple):
    """A step, and the fingerprint of what was asked; None fits nothing."""

    ticket: Ticket
    asked: int | None


class Doubts:
    """Steps of which nobody knows whether they were carried out, the oldest first.

    If the oldest is asked for again it is sent as it was, and is then answered from store should it have been carried
    out. Anything else has to wait until it is known.
    """

    def __init__(self) -> None:
        self._held: list[_Doubt] = []

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Ticket]:
        return (doubt.ticket for doubt in self._held)

    def asked_again(self, step: step_pb2.StepInput, parts: list[memoryview], news: News) -> step_pb2.StepInput | None:
        """The oldest step, as it was sent, if it is what is asked for now: else it would not be known for the same."""
        if not self._held:
            return None
        doubt = self._held[0]
        # the weights may have been stepped since, and the loss is to be that of the weights as they are
        same = news.told + len(news.events) == doubt.ticket.told and Ticket(step, parts, NO_NEWS).asks == doubt.asked
        return doubt.ticket.step if same else None

    def append(self, ticket: Ticket, fits: bool = True) -> None:
        """Adds a step, unless it is there.

        Args:
            fits: whether it can be asked for again: if it was sent under one number only.
        """
        if all(known.step is not ticket.step for known in self):
            self._held.append(_Doubt(ticket, ticket.asks if fits else None))

    def put_first(self, ticket: Ticket, fits: bool = True) -> None:
        """Adds a step that comes before all others."""
        self._held.insert(0, _Doubt(ticket, ticket.asks if fits else None))

    def remove(self, ticket: Ticket) -> None:
        """Lets go of a step that was answered, if it is there."""
        self._held = [doubt for doubt in self._held if doubt.ticket.step is not ticket.step]

    def renumber(self) -> None:
        """Drops the oldest, which was refused: those behind it have other numbers, and can be asked for no more."""
        self._held = [_Doubt(doubt.ticket, None) for doubt in self._held[1:]]
