"""What a subclass of PML's classes may override is called here too, or refused where the subclass is defined."""

import inspect
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import pytorch_metric_learning.distances
import pytorch_metric_learning.losses
import pytorch_metric_learning.miners
import pytorch_metric_learning.reducers
import torch
from torch import Tensor

from gradbank import distances, losses, miners, reducers

_NAMES_ONLY = {  # of the parts of a loss, which are what a loss of one's own returns
    "sub_loss_names",
    "regularization_loss_names",
    "all_regularization_loss_names",
}
_NOT_PAIRS = {"VICRegLoss", "P2SGradLoss", "ManifoldLoss", "InstanceLoss"}  # which define compute_loss, or forward


def _methods(pml: ModuleType, ours: ModuleType) -> Iterator[tuple[type, str]]:
    """Methods of PML's classes that the class of this name has not, by that class."""
    for name, theirs in vars(pml).items():
        mine = getattr(ours, name, None)
        if not inspect.isclass(theirs) or mine is None or name.startswith(("Base", "Generic", "Weight", "Embedding")):
            continue
        if name in _NOT_PAIRS:
            continue
        for each in theirs.__mro__:
            if each.__module__.startswith("pytorch_metric_learning"):
                for method, what in vars(each).items():
                    known = hasattr(mine, method) or method in _NAMES_ONLY or method.startswith(("__", "get_default_"))
                    if inspect.isfunction(what) and not known:
                        yield mine, method


_ALL = sorted(
    {
        (mine, method)
        for pml, ours in (
            (pytorch_metric_learning.losses, losses),
            (pytorch_metric_learning.miners, miners),
            (pytorch_metric_learning.distances, distances),
            (pytorch_metric_learning.reducers, reducers),
        )
        for mine, method in _methods(pml, ours)
    },
    key=lambda pair: (pair[0].__name__, pair[1]),
)


def test_the_list_of_methods_is_that_of_pml() -> None:
    assert len(_ALL) > 200


@pytest.mark.parametrize(("base", "method"), _ALL, ids=lambda each: getattr(each, "__name__", each))
def test_what_nobody_would_call_is_refused(base: type, method: str) -> None:
    with pytest.raises(TypeError, match=f"Mine overrides {method}, which .* not call: "):
        type("Mine", (base,), {method: lambda self, *args, **kwargs: None})


def test_a_mixin_is_seen() -> None:
    class Halving:
        def pos_calc(self, *given: Any) -> None:
            """What PML would call."""

    with pytest.raises(TypeError, match="Mine overrides pos_calc, which ContrastiveLoss does not call"):
        type("Mine", (Halving, losses.ContrastiveLoss), {})


def test_a_forward_that_ends_in_ours_leaves_hooks_out_and_a_warning_says_so() -> None:
    class Squared(losses.ContrastiveLoss):
        def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]  # as users have it
            made: Tensor = super().forward(embeddings * 2, labels)
            return made

        def pos_calc(self, *given: Any) -> None:
            """What PML would call."""

    embeddings, labels = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    with pytest.warns(
        UserWarning, match=r"Squared.forward has what it overrides \(pos_calc\) called by nobody"
    ) as warned:
        Squared()(embeddings, labels)
    assert warned[0].filename == __file__
    with warnings.catch_warnings(action="error"):
        Squared()(embeddings, labels)  # said once


def test_a_queue_that_is_written_to_by_a_method_of_ones_own_is_refused() -> None:
    with pytest.raises(TypeError, match="Mine overrides add_to_memory"):
        type("Mine", (losses.CrossBatchMemory,), {"add_to_memory": lambda self, *args: None})


def test_a_class_that_calls_its_method_itself_may_have_it() -> None:
    class Halved(reducers.MeanReducer):
        def element_reduction(self, losses: Tensor, *rest: Any) -> Tensor:
            return self.element_reduction_helper(losses)

        def element_reduction_helper(self, losses: Tensor) -> Tensor:
            return losses.mean() / 2

    class Own(losses.ContrastiveLoss):
        def forward(self, embeddings: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.pos_calc(embeddings)

        def pos_calc(self, embeddings: Tensor) -> Tensor:
            return embeddings.sum()

    class Quartered(Halved):
        def element_reduction_helper(self, losses: Tensor) -> Tensor:
            return super().element_reduction_helper(losses) / 2

    class Declared(losses.PairLoss):
        def terms(self, anchors: Any) -> Any:
            return {"loss": anchors.per_positive(self.sigmoid(anchors.s))}

        def sigmoid(self, s: Tensor) -> Tensor:
            return s.sigmoid()

    embeddings, labels = torch.ones(4, 2), torch.tensor([0, 0, 1, 1])
    assert float(Declared()(embeddings, labels)) == pytest.approx(0.5)
    assert float(Own()(embeddings, labels)) == 8
    whole = losses.NTXentLoss()(embeddings, labels)
    assert float(losses.NTXentLoss(reducer=Halved())(embeddings, labels)) == pytest.approx(float(whole) / 2)
    assert float(losses.NTXentLoss(reducer=Quartered())(embeddings, labels)) == pytest.approx(float(whole) / 4)


def test_a_reducer_may_say_what_nothing_costs() -> None:
    class Costly(reducers.MeanReducer):
        def zero_loss(self, embeddings: Tensor) -> Tensor:
            return super().zero_loss(embeddings) + 5

    embeddings, labels = torch.eye(3), torch.arange(3)  # without a positive pair
    loss = losses.ContrastiveLoss(neg_margin=0.1, reducer=reducers.MultipleReducers({"pos_loss": Costly()}))
    assert float(loss(embeddings, labels)) == pytest.approx(5)


def test_methods_that_a_loss_of_ones_own_calls_are_there() -> None:
    class Own(losses.BaseMetricLossFunction):
        def get_default_reducer(self) -> reducers.Reducer:
            assert isinstance(super().get_default_reducer(), reducers.MeanReducer)
            return reducers.SumReducer()

        def compute_loss(self, *given: Any) -> Any:
            return {"loss": self.zero_loss()}

    loss = Own()
    assert float(loss(torch.eye(2), torch.arange(2))) == 0
    assert isinstance(loss.get_default_distance(), distances.LpDistance)
    assert isinstance(loss.reducer, reducers.SumReducer)
    loss.set_reducer(reducers.ThresholdReducer(low=0))
    assert isinstance(loss.reducer, reducers.ThresholdReducer)
    loss.set_reducer(None)
    assert isinstance(loss.reducer, reducers.SumReducer)
    assert isinstance(miners.MultiSimilarityMiner().get_default_distance(), distances.CosineSimilarity)
    assert isinstance(losses.TripletMarginLoss().get_default_reducer(), reducers.AvgNonZeroReducer)
