"""What an engine needs to know of a loss."""

from collections.abc import Mapping
from typing import Protocol

from gradbank.distances import Distance
from gradbank.engine.anchors import Anchors, Part
from gradbank.engine.statistics import Statistic
from gradbank.reducers import Reducer


class Declaration(Protocol):
    """A loss, as every engine evaluates it.

    Positives are few, so the loss sees each one; negatives are many, so it sees statistics of them.
    """

    @property
    def distance(self) -> Distance: ...

    @property
    def reducer(self) -> Reducer: ...

    @property
    def joins_anchors(self) -> bool:
        """Whether a part of the loss is written on several anchors together."""
        ...

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        """The statistics of each anchor's negatives that `terms` will use, by name."""
        ...

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        """The named parts of the loss, before they are reduced and added."""
        ...


def statistics_of(loss: Declaration, anchors: Anchors) -> Mapping[str, Statistic]:
    """What a loss asks of its anchors' negatives.

    Raises:
        TypeError: its `negatives` gives something else.
    """
    made = loss.negatives(anchors)
    if isinstance(made, Mapping) and all(isinstance(each, Statistic) for each in made.values()):
        return made
    raise TypeError(
        f"{type(loss).__name__}.negatives must give statistics by name, as in {{'near': engine.LogSumExp(...)}}, got "
        f"{_told(made)}"
    )


def parts_of(loss: Declaration, anchors: Anchors) -> Mapping[str, Part]:
    """What a loss comes to.

    Raises:
        TypeError: its `terms` gives something else.
    """
    made = loss.terms(anchors)
    if isinstance(made, Mapping) and made and all(isinstance(each, Part) for each in made.values()):
        return made
    raise TypeError(
        f"{type(loss).__name__}.terms must give parts by name, as in {{'loss': anchors.per_anchor(...)}}, got "
        f"{_told(made)}"
    )


def _told(made: object) -> str:
    if isinstance(made, Mapping) and made:
        return "{" + ", ".join(f"{name!r}: {type(each).__name__}" for name, each in made.items()) + "}"
    return "nothing" if made is None or isinstance(made, Mapping) else f"a {type(made).__name__}"
