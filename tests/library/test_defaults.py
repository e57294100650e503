"""What an argument is that is left out, or None."""

import inspect
from typing import Any

import pytest

from gradbank import distances, losses, reducers
from gradbank.component import component
from gradbank.spec import Spec
from gradbank_server.build import build

from .conftest import sent


@pytest.mark.parametrize("given", [{}, {"distance": None, "reducer": None, "embedding_regularizer": None}])
def test_none_is_the_default(given: dict[str, Any]) -> None:
    loss = losses.ContrastiveLoss(**given)
    assert type(loss.distance) is distances.LpDistance
    assert type(loss.reducer) is reducers.AvgNonZeroReducer
    assert loss.embedding_regularizer is None, "which has no other default"
    other = losses.ContrastiveLoss(**given)
    assert other.distance is not loss.distance, "a default is made for each"
    loss.distance = None  # type: ignore[assignment]
    assert type(loss.distance) is distances.LpDistance


def test_a_class_says_what_its_default_is() -> None:
    @component
    class Cosine(losses.ContrastiveLoss):
        def get_default_distance(self) -> distances.Distance:
            return distances.CosineSimilarity()

    class PmlStyle(losses.ContrastiveLoss):
        def __init__(self, alpha: float, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.alpha = alpha

        def get_default_distance(self) -> distances.Distance:
            return distances.LpDistance(p=1)

        def get_default_reducer(self) -> reducers.Reducer:
            return reducers.ThresholdReducer(low=0.5)

    assert type(Cosine().distance) is type(Cosine(distance=None).distance) is distances.CosineSimilarity
    assert type(Cosine(distance=distances.LpDistance()).distance) is distances.LpDistance
    assert type(Cosine().reducer) is reducers.AvgNonZeroReducer
    assert build(sent(Spec("Cosine", {"distance": None}))).spec() == Cosine().spec()
    loss = PmlStyle(0.5, pos_margin=0.1)
    assert (loss.alpha, loss.pos_margin, loss.distance.p, loss.reducer.low) == (0.5, 0.1, 1, 0.5)
    assert type(PmlStyle(0.5, reducer=reducers.MeanReducer()).reducer) is reducers.MeanReducer
    assert "alpha" not in loss.arguments()


def test_a_signature_shows_none_for_what_is_made() -> None:
    parameters = inspect.signature(losses.NTXentLoss).parameters
    assert parameters["distance"].default is None
    assert parameters["temperature"].default == 0.07
