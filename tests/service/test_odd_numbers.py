"""Numbers that no component means: each is refused where it is given, or its steps are answered as any others."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gradbank
from gradbank import distances, losses
from gradbank.arguments import argument_fields
from gradbank.component import Component, components
from gradbank.distances import Distance
from gradbank.errors import GradbankError, InternalError
from gradbank.losses.loss import Loss
from gradbank.miners import BaseMiner
from gradbank.reducers import BaseReducer
from gradbank.regularizers import BaseRegularizer

D, CLASSES = 4, 4
ODD = (math.nan, math.inf, -math.inf, 1e39, -1e39, 1e308, 1e-308, 0, -1, 0.5, 2**31, 2**62, -(2**62))
BY_ROWS = {"num_classes", "embedding_size", "memory_size"}  # what these make is as large as they say
BESIDE: dict[str, dict[str, Any]] = {
    "BatchedDistance": {"distance": distances.LpDistance()},
    "ClassWeightedReducer": {"weights": torch.ones(CLASSES)},
    "CrossBatchMemory": {"loss": losses.ContrastiveLoss(), "embedding_size": D},
    "MultipleLosses": {"losses": [losses.NTXentLoss()]},
    "MultipleReducers": {"reducers": {}},
    "SelfSupervisedLoss": {"loss": losses.NTXentLoss()},
}
NAMES = sorted(name for name, each in components().items() if each.__module__.startswith("gradbank."))


def loss_with(part: Component) -> Loss | None:
    match part:
        case Loss():
            return part
        case BaseMiner():
            return losses.CrossBatchMemory(losses.TripletMarginLoss(), D, 16, miner=part)
        case Distance():
            return losses.NTXentLoss(distance=part) if part.is_inverted else losses.ContrastiveLoss(distance=part)
        case BaseReducer():
            return losses.ContrastiveLoss(reducer=part)
        case BaseRegularizer():
            return losses.NTXentLoss(embedding_regularizer=part)
    return None


def with_odd_numbers(name: str) -> Iterator[tuple[str, Any, Loss]]:
    kind = components()[name]
    fields = [each.name for each in argument_fields(kind)]
    given = {"num_classes": CLASSES, "embedding_size": D} if "embedding_size" in fields else {}
    for argument in fields:
        for odd in ODD:
            if argument in BY_ROWS and odd > 1000:
                continue
            try:
                made = loss_with(kind(**{**given, **BESIDE.get(name, {}), argument: odd}))
            except (ValueError, TypeError, RuntimeError, OverflowError):
                continue
            if made is not None:
                yield argument, odd, made


@pytest.mark.parametrize("name", NAMES)
def test_no_number_is_a_fault_of_the_server(name: str) -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(8, D), torch.arange(8) // 2
    with gradbank.connect("local://") as client:
        for number, (argument, odd, loss) in enumerate(with_odd_numbers(name)):
            try:
                there = client.open(f"odd-{number}", loss)
                for _ in range(2):
                    there(embeddings.clone().requires_grad_(), embeddings if name == "SelfSupervisedLoss" else labels)
            except InternalError as error:
                raise AssertionError(f"{argument}={odd}") from error
            except GradbankError:
                continue
            finally:
                client.close_session(f"odd-{number}")
