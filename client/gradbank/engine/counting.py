"""Losses counted, for the statistics of a reducer, by whichever engine evaluates them."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace

import torch

from gradbank.engine.anchors import Anchors, Part
from gradbank.engine.declaration import Declaration
from gradbank.engine.statistics import Statistic
from gradbank.reducers import Reducer, Tally, write


def count(loss: Declaration, evaluation: Callable[[Declaration], object]) -> None:
    """Writes the statistics of the reducer of a loss that was evaluated, which is done once more, without gradients.

    Each statistic is found by a `Tally`, a reducer that adds up how many losses there are in the place of what they
    cost. So what is evaluated is the loss with each of its parts once for every tally, and an engine sees nothing new.
    """
    counting = _Counting(loss)
    with torch.no_grad():
        evaluation(counting)
    counting.write()


class _Counting:
    """A loss with each of its parts once for every tally of the part's reducer."""

    def __init__(self, loss: Declaration) -> None:
        self.loss, self.distance, self.joins_anchors = loss, loss.distance, loss.joins_anchors
        self.reducer = _ByTally(loss.reducer)
        self.parts: dict[str, None] = {}  # their names, in order

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        self.copies = {}
        wanted: dict[str, Statistic] = {}
        for name, statistic in self.loss.negatives(anchors).items():
            stands_for_losses = type(statistic).reduced_by is not Statistic.reduced_by
            number = len(self.reducer.tallies_of(name)) if stands_for_losses else 1
            self.copies[name] = max(number, 1)
            wanted.update({_key(name, i): copy(statistic) for i in range(self.copies[name])})
        return wanted

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        parts = self._parts(anchors, 0)
        self.parts.update(dict.fromkeys(parts))
        for name, part in parts.items():
            for _, tally in self.reducer.tallies_of(name):
                if part.kind == "already_reduced":
                    tally.take_one(part.losses)
        made = {_key(name, 0): part for name, part in parts.items()}
        for i in range(1, max(len(self.reducer.tallies_of(name)) for name in parts)):
            made.update({_key(name, i): part for name, part in self._parts(anchors, i).items()})
        return made

    def write(self) -> None:
        """Sets the statistics, those of the last part where a reducer has several."""
        for name in self.parts:
            write([tally for _, tally in self.reducer.tallies_of(name)])

    def _parts(self, anchors: Anchors, i: int) -> Mapping[str, Part]:
        """The parts of the loss as the tallies numbered i, or else the last ones, see them."""
        found = {name: anchors.found[_key(name, min(i, number - 1))] for name, number in self.copies.items()}
        return self.loss.terms(replace(anchors, found=found))


class _ByTally(Reducer):
    """For each part of a loss and each tally of the part's reducer, the reducer that leads there."""

    def __init__(self, reducer: Reducer) -> None:
        super().__init__()
        self.counts_for = reducer
        self.known: dict[str, list[tuple[Reducer, Tally]]] = {}
        self.leading: dict[str, Reducer] = {}

    def tallies_of(self, part: str) -> list[tuple[Reducer, Tally]]:
        if part not in self.known:
            self.known[part] = self.counts_for.of(part).tallies()
            self.leading.update({_key(part, i): reducer for i, (reducer, _) in enumerate(self.known[part])})
        return self.known[part]

    def of(self, part: str) -> Reducer:
        return self.leading.get(part, self)


def _key(name: str, i: int) -> str:
    return f"{name}, for tally {i}"
