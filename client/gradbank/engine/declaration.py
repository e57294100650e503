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
