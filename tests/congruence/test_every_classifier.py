"""Every loss that learns weights of classes: PML, the whole matrix, tiles of it, and a server."""

from typing import Any

import pytest
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.reducers as pml_reducers
import pytorch_metric_learning.regularizers as pml_regularizers
import torch
from torch import Tensor

import gradbank
from gradbank import engine, losses, miners, reducers, regularizers
from gradbank.engine import Bounds

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # in PML

B, C, D = 14, 6, 8
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "ArcFaceLoss": [{}, {"margin": 40, "scale": 16}],
    "CosFaceLoss": [{}, {"margin": 0.2, "scale": 8}],
    "LargeMarginSoftmaxLoss": [{}, {"margin": 10}, {"margin": 2, "scale": 3}],
    "NormalizedSoftmaxLoss": [{}, {"temperature": 0.3}],
    "ProxyAnchorLoss": [{}, {"margin": 0.2, "alpha": 8}],
    "ProxyNCALoss": [{}, {"softmax_scale": 3}],
    "SoftTripleLoss": [{}, {"centers_per_class": 3, "la": 5, "gamma": 0.5, "margin": 0.1}],
    "SphereFaceLoss": [{}, {"margin": 3}],
    "SubCenterArcFaceLoss": [{}, {"sub_centers": 2, "margin": 20, "scale": 16}],
}
EVERY = [(name, arguments) for name, several in ARGUMENTS.items() for arguments in several]
ENGINES: list[tuple[str, Bounds | None]] = [("dense", None), ("tiled", None), ("tiled", Bounds(tile=20, rows=4))]


def named(value: Any) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) or "defaults" if isinstance(value, dict) else str(value)


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(B, D, dtype=dtype, generator=generator)
    return rows, torch.randint(C - 1, (B,), generator=generator)  # the last class is not there


def both(name: str, arguments: dict[str, Any], **options: tuple[Any, Any]) -> tuple[Any, Any]:
    """Ours and PML's, with the same weights."""
    torch.manual_seed(0)
    ours, theirs = (
        getattr(library, name)(
            num_classes=C, embedding_size=D, **arguments, **{key: each[i] for key, each in options.items()}
        ).double()
        for i, library in enumerate((losses, pml_losses))
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def call(loss: Any, embeddings: Tensor, *rest: Any) -> list[Tensor]:
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, *rest)
    return [value.detach(), *torch.autograd.grad(value, [leaf, *loss.parameters()])]


def agree(ours: Any, theirs: Any, *rest: Any) -> None:
    wanted = call(theirs, *rest)
    for kind, bounds in ENGINES:
        with engine.using(kind, bounds):
            torch.testing.assert_close(call(ours, *rest), wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("name", "arguments"), EVERY, ids=named)
@pytest.mark.parametrize("kind", ["plain", "one class", "pairs", "triplets"])
def test_value_and_gradients_are_those_of_pml(name: str, arguments: dict[str, Any], kind: str) -> None:
    embeddings, labels = batch(1)
    rest: tuple[Any, ...] = ()
    if kind == "one class":
        labels = torch.full_like(labels, 2)
    if kind == "pairs":
        rest = (miners.MultiSimilarityMiner(0.5)(embeddings, labels),)
    if kind == "triplets":
        rest = (miners.TripletMarginMiner(0.1)(embeddings, labels),)
    agree(*both(name, arguments), embeddings, labels, *rest)


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("reducer", ["MeanReducer", "SumReducer", "AvgNonZeroReducer", "ClassWeightedReducer"])
def test_reducers(name: str, reducer: str) -> None:
    if (name, reducer) == ("ProxyAnchorLoss", "ClassWeightedReducer"):
        pytest.skip("PML reads the labels of embeddings at the places of proxies")
    options = {"weights": torch.linspace(0.5, 2, C, dtype=torch.float64)} if reducer.startswith("Class") else {}
    made = tuple(getattr(library, reducer)(**options) for library in (reducers, pml_reducers))
    agree(*both(name, {}, reducer=made), *batch(2))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_weights_are_regularized(name: str) -> None:
    made = (regularizers.LpRegularizer(power=2), pml_regularizers.LpRegularizer(power=2))
    agree(*both(name, {}, weight_regularizer=made, weight_reg_weight=(0.3, 0.3)), *batch(3))


@pytest.mark.parametrize(("name", "arguments"), EVERY, ids=named)
def test_logits_are_those_of_pml(name: str, arguments: dict[str, Any]) -> None:
    ours, theirs = both(name, arguments)
    embeddings = batch(4)[0]
    theirs.to(embeddings.device)  # where ours need not be
    found, wanted = ours.get_logits(embeddings), theirs.get_logits(embeddings)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_outliers_are_those_of_pml() -> None:
    ours, theirs = both("SubCenterArcFaceLoss", {})
    embeddings, labels = batch(5)
    for threshold in (60, 75, 90):
        found, wanted = (each.get_outliers(embeddings, labels, threshold) for each in (ours, theirs))
        assert found[0].sort().values.tolist() == wanted[0].sort().values.tolist()
        present = labels.unique()  # of an absent class PML returns what the memory held
        torch.testing.assert_close(found[1][:, present], wanted[1][:, present])


@pytest.mark.parametrize(("loss_name", "arguments"), EVERY, ids=named)
def test_remote_equals_local(embedded: gradbank.Client, loss_name: str, arguments: dict[str, Any], name: str) -> None:
    """Bit for bit, whatever the loss is multiplied by."""
    here, _ = both(loss_name, arguments)
    here = here.float()
    there = embedded.open(name, here)
    embeddings, labels = batch(6, torch.float32)
    gradients = []
    for loss in (here, there):
        leaf = embeddings.clone().requires_grad_()
        value = loss(leaf, labels)
        (value * 3.7).backward()
        gradients.append((value.detach(), leaf.grad))
    embedded.close_session(name)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
