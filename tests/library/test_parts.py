"""What a component is made of must be of the kind that it is annotated as, and batches are tensors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning import distances as pml_distances
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning import reducers as pml_reducers
from torch import nn

from gradbank import distances, losses, miners, reducers, regularizers
from gradbank.component import Component, foundation
from gradbank.distances import Distance

BATCH = torch.randn(8, 4), torch.arange(8) % 2
MAKES_ONE = r"gradbank\.from_pml\(\.\.\.\) makes it one"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: losses.NTXentLoss(distance="cosine"), "NTXentLoss: distance must be a Distance, got 'cosine'"),
        (lambda: losses.NTXentLoss(distance=distances.LpDistance), r"got the class LpDistance: .* LpDistance\(...\)"),
        (lambda: losses.NTXentLoss(distance=pml_distances.LpDistance()), f"must be a Distance, .*{MAKES_ONE}"),
        (lambda: losses.NTXentLoss(distance=reducers.MeanReducer()), r"got gradbank\.reducers\..*MeanReducer$"),
        (lambda: losses.NTXentLoss(distance=[distances.LpDistance()]), "distance must be a Distance, got "),
        (lambda: losses.NTXentLoss(reducer=pml_reducers.MeanReducer()), f"must be a Reducer, .*{MAKES_ONE}"),
        (lambda: losses.NTXentLoss(embedding_regularizer=regularizers.LpRegularizer), "must be a Regularizer"),
        (lambda: losses.CrossBatchMemory(pml_losses.NTXentLoss(), 4, 32), f"must be a Base.*Function, .*{MAKES_ONE}"),
        (lambda: losses.CrossBatchMemory(losses.NTXentLoss, 4, 32), "got the class NTXentLoss"),
        (
            lambda: losses.CrossBatchMemory(losses.NTXentLoss(), 4, 32, miner=pml_miners.MultiSimilarityMiner()),
            f"miner must be a Miner, .*{MAKES_ONE}",
        ),
        (lambda: losses.MultipleLosses([losses.NTXentLoss]), "losses must be a Module, got the class NTXentLoss"),
        (lambda: losses.MultipleLosses({"a": losses.NTXentLoss}), "losses must be a Module, got the class NTXentLoss"),
        (lambda: losses.MultipleLosses([reducers.MeanReducer()]), "losses must each be a Loss, got MeanReducer"),
        (
            lambda: losses.MultipleLosses([losses.NTXentLoss()], [distances.LpDistance()]),
            "miners must each be a Miner, got LpDistance",
        ),
        (lambda: losses.SelfSupervisedLoss(pml_losses.NTXentLoss()), f"loss must be a Loss, .*{MAKES_ONE}"),
        (lambda: miners.MultiSimilarityMiner(distance=pml_distances.LpDistance()), "MultiSimilarityMiner: distance"),
        (lambda: reducers.MultipleReducers({"loss": pml_reducers.MeanReducer()}), "reducers must be a Reducer"),
    ],
)
def test_a_part_of_another_kind_is_refused_where_it_is_given(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(TypeError, match=told):
        make()


def test_so_is_one_that_is_put_in_place_of_another() -> None:
    loss_fn = losses.NTXentLoss()
    with pytest.raises(TypeError, match="NTXentLoss: reducer must be a Reducer, got 'sum'"):
        loss_fn.reducer = "sum"  # type: ignore[assignment]
    assert isinstance(loss_fn.reducer, reducers.MeanReducer)


def test_several_may_be_given_as_a_module_has_them() -> None:
    @foundation
    class Several(Component):
        parts: list[Distance] | dict[str, Distance]

    made = Several([distances.LpDistance(), distances.CosineSimilarity()])
    again = Several(made.parts)  # a ModuleList
    again.parts = again.parts
    named = Several(nn.ModuleDict({"near": distances.LpDistance()}))  # type: ignore[arg-type]
    assert (len(again.parts), list(named.parts)) == (2, ["near"])
    with pytest.raises(TypeError, match=r"parts must be a Distance, got .*MeanReducer"):
        Several(nn.ModuleList([reducers.MeanReducer()]))  # type: ignore[arg-type]


def test_what_may_be_a_component_or_something_else_is_not_looked_at() -> None:
    @foundation
    class Either(Component):
        distance: Distance | float = 1.0

    assert (Either(2.0).distance, Either("anything").distance) == (2.0, "anything")  # type: ignore[arg-type]
    assert isinstance(Either(distances.LpDistance()).distance, Distance)


@pytest.mark.parametrize("given", [[0, 1] * 4, np.arange(8) % 2])
def test_labels_that_are_no_tensor_are_refused(given: Any) -> None:
    for loss_fn in (losses.NTXentLoss(), losses.ArcFaceLoss(2, 4), losses.CrossBatchMemory(losses.NTXentLoss(), 4, 9)):
        with pytest.raises(TypeError, match=r"labels must be a tensor, got .*torch\.as_tensor\(labels\)"):
            loss_fn(BATCH[0], given)
    with pytest.raises(TypeError, match="embeddings must be a tensor, got ndarray"):
        losses.NTXentLoss()(BATCH[0].numpy(), BATCH[1])
    with pytest.raises(TypeError, match="indices_tuple must hold tensors, got list"):
        losses.CircleLoss()(*BATCH, ([0], [2], [1]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^labels are 5 to 6, but must stay within 0\.\.1"):
        losses.MarginLoss(num_classes=2)(BATCH[0], BATCH[1] + 5)


def test_annotations_that_mean_nothing_here_are_not_looked_at() -> None:
    """Those of the classes that it is written on still are."""

    @foundation
    class Annotated(losses.ContrastiveLoss):
        nowhere: "absent.Type | None" = None  # type: ignore[name-defined]  # noqa: F821  # as of a type checker's import
        subscripted: "int[str] | None" = None  # type: ignore[type-arg]

    made = Annotated(nowhere="anything")
    assert made.nowhere == "anything"
    assert made(*BATCH).isfinite()
    with pytest.raises(TypeError, match="Annotated: distance must be a Distance, got 'cosine'"):
        Annotated(distance="cosine")
