"""What an engine needs to know of a loss."""

from collections.abc import Mapping
from typing import Protocol

from gradbank.distances import Distance
from gradbank.engine.anchors import Anchors
from gradbank.engine.statistics import Statistic
from gradbank.reducers import Ratio


class Declaration(Protocol):
    """A loss, as every engine evaluates it.

    Positives are few, so the loss sees each one; negatives are many, so it sees statistics of them.
    """

    distance: Distance

    def negatives(self) -> Mapping[str, Statistic]:
        """The statistics of each anchor's negatives that `terms` will use, by name."""
        ...

    def terms(self, anchors: Anchors) -> Mapping[str, Ratio]:
        """The named parts of the loss of a block of anchors; the loss is the sum of their values."""
        ...
