"""Losses with every distance and reducer, ours and PML's, and batches to try them on."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.reducers as pml_reducers
from torch import nn

from gradbank import distances, losses, reducers

LOSSES = ("ContrastiveLoss", "MultiSimilarityLoss", "NTXentLoss", "SupConLoss", "TripletMarginLoss")
DISTANCES: dict[str, Callable[[ModuleType], Any]] = {
    "Lp": lambda m: m.LpDistance(),
    "squared": lambda m: m.LpDistance(power=2),
    "L1": lambda m: m.LpDistance(p=1, normalize_embeddings=False),
    "cosine": lambda m: m.CosineSimilarity(),
    "dot": lambda m: m.DotProductSimilarity(normalize_embeddings=False),
}
REDUCERS: dict[str, Callable[[ModuleType], Any]] = {
    "mean": lambda m: m.MeanReducer(),
    "above 0": lambda m: m.AvgNonZeroReducer(),
    "above": lambda m: m.ThresholdReducer(low=0.2),
    "below": lambda m: m.ThresholdReducer(high=0.7),
    "between": lambda m: m.ThresholdReducer(low=0.1, high=0.5),
}


@dataclass(frozen=True)
class Recipe:
    """Which loss, with which distance and which reducer."""

    loss: str
    distance: str
    reducer: str

    def ours(self) -> losses.PairLoss:
        made: losses.PairLoss = self._built(losses, distances, reducers)
        return made

    def theirs(self) -> nn.Module:
        made: nn.Module = self._built(pml_losses, pml_distances, pml_reducers)
        return made

    def _built(self, library: ModuleType, distance: ModuleType, reducer: ModuleType) -> Any:
        parts = {"distance": DISTANCES[self.distance](distance), "reducer": REDUCERS[self.reducer](reducer)}
        if self.loss == "ContrastiveLoss" and self.distance in ("cosine", "dot"):
            return library.ContrastiveLoss(0.9, 0.2, **parts)  # not at 1, where equal rows lie by a rounding
        return getattr(library, self.loss)(**parts)


@pytest.fixture(params=LOSSES)
def recipes(request: pytest.FixtureRequest) -> list[Recipe]:
    """A loss with every distance and every reducer, to draw from."""
    return [Recipe(request.param, distance, reducer) for distance in DISTANCES for reducer in REDUCERS]


# MultiSimilarityLoss is never 0, but what it costs can be less than a rounding of PML's, whose reducer then drops it
EDGES = [(loss, reducer) for loss in LOSSES for reducer in ("mean", "above 0", "between")]
EDGES.remove(("MultiSimilarityLoss", "above 0"))


@pytest.fixture(
    params=[Recipe(loss, distance, reducer) for loss, reducer in EDGES for distance in ("Lp", "L1", "cosine")],
    ids=lambda recipe: f"{recipe.loss}, {recipe.distance}, {recipe.reducer}",
)
def recipe(request: pytest.FixtureRequest) -> Recipe:
    made: Recipe = request.param
    return made
