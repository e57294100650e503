"""Arguments that are learned, as a temperature is in CLIP: their gradient is what differences say."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradbank
from gradbank import component, distances, engine, losses, regularizers
from gradbank.engine import Anchors
from gradbank.errors import InvalidComponent
from gradbank.learned import learned_arguments
from gradbank.losses.base import BaseMetricLossFunction
from gradbank.losses.pair import softplus

_CLASSES = {"num_classes": 5, "embedding_size": 8}
_AT = {
    "scale": 3.0,
    "softmax_scale": 3.0,
    "gamma": 2.0,
    "la": 3.0,
    "beta": 2.0,
    "alpha": 3.0,
    "temperature": 0.3,
}  # where nothing saturates
_NOT_SMOOTH = {"HistogramLoss", "FastAPLoss", "DynamicSoftMarginLoss", "ManifoldLoss", "VICRegLoss"}  # or not of labels
_NEEDED = {"RankedListLoss": {"margin": 0.4, "Tn": 3.0}}
_WITHOUT = {
    ("MarginLoss", "beta"),
    ("MarginLoss", "nu"),
    ("SphereFaceLoss", "margin"),
    ("LargeMarginSoftmaxLoss", "margin"),
}  # weights, of weights that are not learned here, counts


def _cases() -> list[tuple[str, str, float]]:
    cases = []
    for name in losses.__all__:
        kind = getattr(losses, name)
        if not name.endswith("Loss") or inspect.isabstract(kind) or name in _NOT_SMOOTH:
            continue
        for each in dataclasses.fields(kind):
            if each.init and not each.kw_only and isinstance(each.default, float) and (name, each.name) not in _WITHOUT:
                cases.append((name, each.name, _AT.get(each.name, each.default or 0.1)))
    return cases


def made(name: str, **given: Any) -> nn.Module:
    torch.manual_seed(1)
    taken = inspect.signature(getattr(losses, name)).parameters
    sizes = {key: value for key, value in _CLASSES.items() if key in taken}
    loss: nn.Module = getattr(losses, name)(**{**sizes, **_NEEDED.get(name, {}), **given})
    return loss.double()


def batch(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 8, dtype=torch.float64, generator=generator), torch.arange(rows) % 5


def difference(value: Callable[[float], Tensor], at: float, step: float = 1e-6) -> float:
    return float((value(at + step) - value(at - step)).detach()) / (2 * step)


@pytest.mark.parametrize(("name", "argument", "at"), _cases())
@pytest.mark.parametrize("rows", [20, 700])
def test_an_argument_that_is_a_parameter_gets_its_gradient(name: str, argument: str, at: float, rows: int) -> None:
    if rows > 100 and name in ("SmoothAPLoss", "AngularLoss", "TripletMarginLoss"):
        pytest.skip("it takes long, or has so many triplets that differences are none of one smooth function")
    embeddings, labels = batch(rows)
    wanted = difference(lambda value: made(name, **{argument: value})(embeddings, labels), at)
    loss = made(name)
    setattr(loss, argument, nn.Parameter(torch.tensor(at, dtype=torch.float64)))
    loss(embeddings.requires_grad_(), labels).backward()
    found = getattr(loss, argument).grad
    assert float(0 if found is None else found) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert bool(embeddings.grad.any())  # type: ignore[union-attr]  # a backward pass made it


@pytest.mark.parametrize("queue", [False, True])
def test_a_temperature_made_of_a_parameter_is_learned_as_in_clip(queue: bool) -> None:
    embeddings, labels = batch(1200)

    def of(log_t: Tensor) -> Tensor:
        loss = losses.NTXentLoss()
        loss.temperature = log_t.exp()
        whole = losses.CrossBatchMemory(loss, 8, 4096) if queue else loss
        for _ in range(2 if queue else 1):
            value: Tensor = whole(embeddings, labels)
        return value

    log_t = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
    of(log_t).backward()
    wanted = difference(lambda value: of(torch.tensor(value, dtype=torch.float64)), -2.0)
    assert float(log_t.grad) == pytest.approx(wanted, rel=1e-4)  # type: ignore[arg-type]  # a backward pass made it


def test_the_weights_of_several_losses_are_learned() -> None:
    embeddings, labels = batch(20)
    parts = [losses.NTXentLoss(), losses.TripletMarginLoss()]
    wanted = [float(part(embeddings, labels)) for part in parts]
    weights = nn.Parameter(torch.ones(2, dtype=torch.float64))
    for given in (weights, list(weights)):
        weights.grad = None
        losses.MultipleLosses(parts, weights=given)(embeddings, labels).backward()
        assert weights.grad.tolist() == pytest.approx(wanted)  # type: ignore[union-attr]
    of_one = {"a": weights[0], "b": 1.0}
    weights.grad = None
    losses.MultipleLosses(dict(zip("ab", parts)), weights=of_one)(embeddings, labels).backward()
    assert weights.grad.tolist() == pytest.approx([wanted[0], 0])  # type: ignore[union-attr]


def test_the_weight_of_a_regularizer_is_learned() -> None:
    embeddings, labels = batch(20)
    weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    loss = losses.ContrastiveLoss(embedding_regularizer=regularizers.LpRegularizer())
    loss.embedding_reg_weight = weight
    loss(embeddings, labels).backward()
    assert float(weight.grad) == pytest.approx(float(embeddings.norm(dim=1).mean()))  # type: ignore[arg-type]


def test_a_loss_of_ones_own_backpropagates_to_whatever_it_is_made_of() -> None:
    head = nn.Linear(8, 1, dtype=torch.float64)  # which is no part of the loss

    class Weighted(BaseMetricLossFunction):
        def compute_loss(self, embeddings: Tensor, labels: Any, indices: Any, ref_emb: Any, ref_labels: Any) -> Any:
            cost = head(embeddings).squeeze(1).square()
            return {"loss": {"losses": cost, "indices": torch.arange(len(cost)), "reduction_type": "element"}}

    embeddings, labels = batch(20)
    Weighted()(embeddings, labels).backward()
    wanted = torch.autograd.grad(head(embeddings).square().mean(), head.weight)[0]
    torch.testing.assert_close(head.weight.grad, wanted)


def test_a_server_is_not_asked_to_learn_an_argument(client: gradbank.Client) -> None:
    loss = losses.NTXentLoss()
    loss.temperature = nn.Parameter(torch.tensor(0.07))
    with pytest.raises(InvalidComponent, match="temperature of NTXentLoss is learned"):
        client.open("clip", loss)


def test_a_margin_that_is_learned_by_class_is_still_computed_in_tiles() -> None:
    """It is a weight, for which the engine has a gradient."""
    assert not learned_arguments(losses.MarginLoss(learn_beta=True, num_classes=5))
    assert not learned_arguments(losses.ArcFaceLoss(5, 8))


@pytest.mark.parametrize("rows", [20, 700])
def test_a_power_of_a_distance_is_learned(rows: int) -> None:
    embeddings, labels = batch(rows)

    def of(power: Any) -> Tensor:
        value: Tensor = losses.ContrastiveLoss(distance=distances.LpDistance(power=power))(embeddings, labels)
        return value

    power = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    of(power).backward()
    wanted = difference(lambda value: of(torch.tensor(value, dtype=torch.float64)), 2.0)
    assert power.grad.item() == pytest.approx(wanted, rel=1e-4)  # type: ignore[union-attr]  # a backward pass made it


class Clip(losses.NTXentLoss):
    """Learns what its temperature is made of."""

    def __post_init__(self) -> None:
        self.log_t = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.temperature = self.log_t.exp()  # type: ignore[assignment]  # which is learned
        value: Tensor = super().forward(*args, **kwargs)
        return value


@pytest.mark.parametrize("rows", [20, 1200])
@pytest.mark.parametrize("inference", [False, True], ids=["", "labels of inference mode"])
def test_what_an_argument_is_made_of_may_be_a_parameter_of_the_loss(rows: int, inference: bool) -> None:
    embeddings, labels = batch(rows)

    def at(log_t: float) -> Tensor:
        value: Tensor = losses.NTXentLoss(temperature=math.exp(log_t))(embeddings, labels)
        return value

    wanted, loss = difference(at, -2.0), Clip()
    with torch.inference_mode(inference):
        known = labels.clone()
    for _ in range(2):
        loss.zero_grad()
        loss(embeddings, known).backward()
        assert loss.log_t.grad.item() == pytest.approx(wanted, rel=1e-4)  # type: ignore[union-attr]
    assert loss.temperature.grad_fn is not None  # type: ignore[attr-defined]  # it is what it was set to


def test_weights_may_be_made_of_a_parameter_of_the_loss() -> None:
    class Uncertain(losses.MultipleLosses):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.s = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            self.weights = [(-each).exp() for each in self.s]  # type: ignore[misc]  # which are learned
            value: Tensor = super().forward(*args, **kwargs)
            return value + self.s.sum()

    embeddings, labels = batch(20)
    parts = [losses.NTXentLoss(), losses.TripletMarginLoss()]
    loss = Uncertain(parts)
    loss(embeddings, labels).backward()
    wanted = [1 - float(part(embeddings, labels)) for part in parts]
    assert loss.s.grad.tolist() == pytest.approx(wanted)  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "argument"), [("CircleLoss", "m"), ("MarginLoss", "margin"), ("PNPLoss", "anneal")])
def test_a_subclass_may_make_an_argument_of_a_built_in_loss_its_parameter(name: str, argument: str) -> None:
    base: Any = getattr(losses, name)

    class Mine(base):  # type: ignore[misc]
        def __post_init__(self) -> None:
            super().__post_init__()
            setattr(self, argument, nn.Parameter(torch.tensor(getattr(self, argument), dtype=torch.float64)))

    embeddings, labels = batch(700)
    loss = Mine()
    at = float(getattr(loss, argument).detach())
    loss(embeddings, labels).backward()
    wanted = difference(lambda value: base(**{argument: value})(embeddings, labels), at)
    assert getattr(loss, argument).grad.item() == pytest.approx(wanted, rel=1e-4)
    assert loss.arguments()[argument] == at


def test_what_surrounds_a_loss_of_ones_own_leaves_it_what_it_is_made_of() -> None:
    head = nn.Linear(8, 1, dtype=torch.float64)

    class Weighted(BaseMetricLossFunction):
        def compute_loss(self, embeddings: Tensor, labels: Any, indices: Any, ref_emb: Any, ref_labels: Any) -> Any:
            cost = head(embeddings).squeeze(1).square()
            return {"loss": {"losses": cost, "indices": torch.arange(len(cost)), "reduction_type": "element"}}

    embeddings, labels = batch(20)
    (wanted,) = torch.autograd.grad(head(embeddings).square().mean(), head.weight)
    for whole in (losses.MultipleLosses([Weighted()]), losses.CrossBatchMemory(Weighted(), 8, 64)):
        head.zero_grad()
        whole(embeddings, labels).backward()
        torch.testing.assert_close(head.weight.grad, wanted)
    regularized = losses.CrossBatchMemory(
        losses.NTXentLoss(), 8, 64, embedding_regularizer=regularizers.LpRegularizer()
    )
    weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    regularized.embedding_reg_weight = weight  # type: ignore[assignment]  # which is learned
    regularized(embeddings, labels).backward()
    assert weight.grad.item() == pytest.approx(float(embeddings.norm(dim=1).mean()))  # type: ignore[union-attr]


@component
class LearnedGap(losses.PairLoss):
    """Makes its argument a parameter, which is a weight as any other."""

    margin: Any = 0.3
    distance: distances.Distance = field(default_factory=distances.CosineSimilarity, kw_only=True)

    def __post_init__(self) -> None:
        self.margin = nn.Parameter(torch.as_tensor(self.margin, dtype=torch.float32).detach().clone())

    def negatives(self, anchors: Anchors) -> dict[str, Any]:
        return {"far": engine.LogSumExp(lambda s: 5 * (s + self.margin))}

    def terms(self, anchors: Anchors) -> dict[str, Any]:
        return {"loss": anchors.per_positive(softplus(anchors.each(anchors.found["far"].value) - 5 * anchors.s))}


def test_a_loss_of_ones_own_may_make_its_argument_a_parameter(client: gradbank.Client, name: str) -> None:
    embeddings, labels = (each.float() if each.is_floating_point() else each for each in batch(700))
    loss = LearnedGap(margin=0.2)
    assert not learned_arguments(loss)
    loss(embeddings, labels).backward()
    with engine.using("dense"):
        whole = LearnedGap(margin=0.2)
        whole(embeddings, labels).backward()
    torch.testing.assert_close(loss.margin.grad, whole.margin.grad)
    hosted = client.open(name, loss)
    optimizer = hosted.optimizer("SGD", lr=0.1)
    hosted(embeddings.requires_grad_(), labels).backward()
    optimizer.step()
    torch.testing.assert_close(hosted.local().margin.detach(), loss.margin.detach() - 0.1 * loss.margin.grad)
