"""Losses that learn weights of classes: every distance and dtype they take, and the edges, against PML."""

from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.reducers as pml_reducers
import pytorch_metric_learning.regularizers as pml_regularizers
import torch
from torch import Tensor, nn

from gradbank import distances, engine, losses, reducers, regularizers
from gradbank.engine import Bounds
from gradbank.losses import centers
from gradbank.losses.norms import multiplied_angle

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # in PML

B, C, D = 14, 9, 6
NAMES = (
    "ArcFaceLoss",
    "CosFaceLoss",
    "LargeMarginSoftmaxLoss",
    "NormalizedSoftmaxLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "SoftTripleLoss",
    "SphereFaceLoss",
    "SubCenterArcFaceLoss",
)
DISTANCES: dict[str, Any] = {
    "dot": lambda m: m.DotProductSimilarity(normalize_embeddings=False),
    "cosine": lambda m: m.CosineSimilarity(),
    "cosine of p=1": lambda m: m.CosineSimilarity(p=1),
    "cosine squared": lambda m: m.CosineSimilarity(power=2),
    "Lp": lambda m: m.LpDistance(),
    "squared": lambda m: m.LpDistance(power=2, normalize_embeddings=False),
    "SNR": lambda m: m.SNRDistance(),
}
TAKEN = {
    "ArcFaceLoss": ("cosine of p=1", "cosine squared"),
    "CosFaceLoss": ("cosine of p=1", "cosine squared"),
    "NormalizedSoftmaxLoss": tuple(DISTANCES),
    "ProxyAnchorLoss": tuple(DISTANCES),
    "ProxyNCALoss": tuple(DISTANCES),
    "SoftTripleLoss": ("dot", "cosine of p=1", "cosine squared"),
    "SubCenterArcFaceLoss": ("cosine of p=1", "cosine squared"),
}
REDUCERS: dict[str, Any] = {
    "above": lambda m: m.ThresholdReducer(low=0.3),
    "between": lambda m: m.ThresholdReducer(low=0.1, high=60),
    "nonzero": lambda m: m.AvgNonZeroReducer(),
    "multiple": lambda m: m.MultipleReducers({"loss": m.SumReducer(), "neg_loss": m.SumReducer()}),
}
OURS = (losses, distances, reducers, regularizers)
PML = (pml_losses, pml_distances, pml_reducers, pml_regularizers)


@pytest.fixture(params=["dense", "tiled"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with engine.using(request.param, Bounds(tile=70, rows=7)):
        yield request.param


def batch(rows: int = B, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, D, dtype=torch.float64, generator=generator).to(dtype)
    return embeddings, torch.randint(C - 1, (rows,), generator=generator)  # the last class is not there


def ours(name: str, **arguments: Any) -> Any:
    torch.manual_seed(1)
    return getattr(losses, name)(**{"num_classes": C, "embedding_size": D, **arguments})


def both(name: str, distance: str = "", reducer: str = "", regularizer: str = "", **arguments: Any) -> tuple[Any, Any]:
    """Ours and PML's, with the same weights, in float64."""
    made = []
    torch.manual_seed(1)
    for loss, of_distance, of_reducer, of_regularizer in (OURS, PML):
        given = dict(arguments)
        if distance:
            given["distance"] = DISTANCES[distance](of_distance)
        if reducer:
            given["reducer"] = REDUCERS[reducer](of_reducer)
        if regularizer:
            given[f"{regularizer}_regularizer"] = of_regularizer.LpRegularizer(power=2)
            given[f"{regularizer}_reg_weight"] = 0.3
        made.append(getattr(loss, name)(num_classes=C, embedding_size=D, **given).double())
    made[1].load_state_dict(made[0].state_dict())
    return made[0], made[1]


def weights(loss: Any) -> nn.Parameter:
    (parameter,) = loss.parameters()
    assert isinstance(parameter, nn.Parameter)
    return parameter


def answer(loss: Any, embeddings: Tensor, *rest: Any) -> list[Tensor]:
    """The value and the gradients of embeddings and weights."""
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, *rest)
    return [value.detach(), *torch.autograd.grad(value, [leaf, weights(loss)])]


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "distance"), [(name, each) for name, several in TAKEN.items() for each in several])
def test_every_distance_gives_what_pml_does(way: str, name: str, distance: str) -> None:
    mine, theirs = both(name, distance)
    embeddings, labels = batch()
    indices = tuple(torch.randint(B, (n,), generator=torch.Generator().manual_seed(3)) for n in (7, 7, 5, 5))
    same(answer(mine, embeddings, labels), answer(theirs, embeddings, labels))
    same(answer(mine, embeddings, labels, indices), answer(theirs, embeddings, labels, indices))
    same(mine.get_logits(embeddings), theirs.get_logits(embeddings))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reducer", REDUCERS)
def test_every_reducer_gives_what_pml_does(way: str, name: str, reducer: str) -> None:
    mine, theirs = both(name, reducer=reducer)
    same(answer(mine, *batch()), answer(theirs, *batch()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("regularizer", ["weight", "embedding"])
def test_regularizers_are_added_as_in_pml(way: str, name: str, regularizer: str) -> None:
    mine, theirs = both(name, regularizer=regularizer)
    same(answer(mine, *batch()), answer(theirs, *batch()))


@pytest.mark.parametrize("name", NAMES)
def test_unreduced_losses_are_those_of_pml(name: str) -> None:
    embeddings, labels = batch()
    parts = []
    for loss, _, reducer, regularizer in (OURS, PML):
        made = getattr(loss, name)(
            num_classes=C,
            embedding_size=D,
            reducer=reducer.DoNothingReducer(),
            weight_regularizer=regularizer.LpRegularizer(),
        ).double()
        weights(made).data.copy_(torch.linspace(-1, 2, weights(made).numel()).view_as(weights(made)).sin())
        parts.append(made(embeddings, labels))
    assert parts[0].keys() == parts[1].keys()
    for key, wanted in parts[1].items():
        same(parts[0][key]["losses"].detach().squeeze(), wanted["losses"].detach().squeeze())
        assert parts[0][key]["reduction_type"] == wanted["reduction_type"]
        if wanted["indices"] is not None:
            assert parts[0][key]["indices"].tolist() == wanted["indices"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_weights_begin_as_in_pml(name: str) -> None:
    seeded = []
    for library in (losses, pml_losses):
        torch.manual_seed(5)
        seeded.append(getattr(library, name)(num_classes=C, embedding_size=D).state_dict())
    assert seeded[0].keys() == seeded[1].keys()
    assert all(torch.equal(seeded[0][key], seeded[1][key]) for key in seeded[0])
    constant = ours(name, weight_init_func=lambda weight: nn.init.constant_(weight, 0.25))
    assert bool((weights(constant) == 0.25).all())


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_as_close_to_the_truth_as_pml(way: str, name: str) -> None:
    mine, theirs = both(name)
    truth = answer(mine, *batch())
    narrow = [answer(loss.float(), *batch(dtype=torch.float32)) for loss in (mine, theirs)]
    for exact, own, other in zip(truth, *narrow, strict=True):
        assert own.dtype == torch.float32
        errors = [float((each.to(exact) - exact).abs().max() / exact.abs().max()) for each in (own, other)]
        assert errors[0] <= max(2 * errors[1], 2e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_and_leaves_the_weights_wide(way: str, name: str, dtype: torch.dtype) -> None:
    """PML turns the weights to half precision for good."""
    loss, (embeddings, labels) = ours(name), batch(dtype=dtype)
    value, of_embeddings, of_weights = answer(loss, embeddings, labels)
    wide = answer(loss, embeddings.float(), labels)
    assert (value.dtype, of_embeddings.dtype, of_weights.dtype) == (torch.float32, dtype, torch.float32)
    assert weights(loss).dtype == torch.float32
    torch.testing.assert_close([value, of_weights], [wide[0], wide[2]], rtol=0, atol=0)
    torch.testing.assert_close(of_embeddings, wide[1].to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_weights_may_be_narrower_than_embeddings(way: str, name: str) -> None:
    loss = ours(name)
    value, _, of_weights = answer(loss, *batch())
    wide = answer(ours(name).double(), *batch())
    assert (value.dtype, of_weights.dtype) == (torch.float64, torch.float32)
    same(value, wide[0])
    torch.testing.assert_close(of_weights, wide[2].float())


@pytest.mark.parametrize("name", NAMES)
def test_edges(way: str, name: str) -> None:
    mine, theirs = both(name)
    one, many = batch(1), (batch()[0], torch.full((B,), 4))
    same(answer(mine, *one), answer(theirs, *one))
    same(answer(mine, *many), answer(theirs, *many))
    empty = answer(mine, torch.zeros(0, D, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    assert all(bool((each == 0).all()) for each in empty) or name == "ProxyAnchorLoss"
    assert empty[0].isfinite()
    zero = answer(mine, torch.zeros(3, D, dtype=torch.float64), torch.tensor([0, 1, 1]))
    assert all(bool(each.isfinite().all()) for each in zero)
    lone = ours(name, num_classes=1).double()
    assert all(bool(each.isfinite().all()) for each in answer(lone, one[0], torch.tensor([0])))


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_restores_the_loss(name: str) -> None:
    first, second = ours(name), ours(name, weight_init_func=nn.init.zeros_)
    second.load_state_dict(first.state_dict())
    for found, wanted in zip(answer(second, *batch()), answer(first, *batch()), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_weights_may_be_replaced(way: str, name: str) -> None:
    mine, theirs = both(name)
    attribute = next(iter(mine.state_dict()))
    other = torch.randn_like(weights(mine))
    for loss in (mine, theirs):
        setattr(loss, attribute, nn.Parameter(other.clone()))
    same(answer(mine, *batch()), answer(theirs, *batch()))


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_get_no_gradient_and_change_none(way: str, name: str) -> None:
    loss = ours(name).double()
    wanted = answer(loss, *batch())
    weights(loss).requires_grad_(False)
    leaf = batch()[0].requires_grad_()
    value = loss(leaf, batch()[1])
    value.backward()
    same([value.detach(), leaf.grad], wanted[:2])
    assert weights(loss).grad is None
    with torch.no_grad():
        same(loss(leaf, batch()[1]), wanted[0])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_add_up_over_backward_passes(way: str, name: str) -> None:
    """The last pass may use the gradients' own memory; those before it may not."""
    loss = ours(name).double()
    _, of_embeddings, of_weights = answer(loss, *batch())
    leaf = batch()[0].requires_grad_()
    value = loss(leaf, batch()[1])
    value.backward(retain_graph=True)
    value.backward(torch.tensor(2.0), retain_graph=True)
    value.backward(torch.tensor(-0.5))
    same([leaf.grad, weights(loss).grad], [of_embeddings * 2.5, of_weights * 2.5])
    loss(leaf, batch()[1]).backward()
    same(weights(loss).grad, of_weights * 3.5)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_change_before_backward_do_not_matter(way: str, name: str) -> None:
    loss = ours(name).double()
    wanted = answer(loss, *batch())
    leaf = batch()[0].requires_grad_()
    value = loss(leaf, batch()[1])
    with torch.no_grad():
        weights(loss).mul_(3)
    value.backward()
    same(leaf.grad, wanted[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, y: (e, None), "needs labels"),
        (lambda e, y: (e, y - 9), r"labels must be in 0\.\.8 .* got -9\.\.-"),
        (lambda e, y: (e, y + 9), r"labels must be in 0\.\.8"),
        (lambda e, y: (e, y.float()), "labels must be integers"),
        (lambda e, y: (e, y[1:]), r"labels must be \(14,\)"),
        (lambda e, y: (e[:, 1:], y), "embeddings have dimension 5, .* embedding_size=6"),
        (lambda e, y: (e[None], y), r"embeddings must be \(batch, dimension\)"),
        (lambda e, y: (e, y, None, e.clone()), "takes no ref_emb or ref_labels"),
        (lambda e, y: (e, y, None, e, y.clone()), "takes no ref_emb or ref_labels"),
        (lambda e, y: (e, y, (y, y)), "indices_tuple must be"),
        (lambda e, y: (e, y, (y + 14, y, y)), "must stay within 0..13"),
    ],
)
def test_bad_input_is_refused(name: str, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(name)(*call(*batch()))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ArcFaceLoss", {"num_classes": 0}, "num_classes must be a whole number, at least 1"),
        ("ProxyNCALoss", {"embedding_size": 0}, "embedding_size must be a whole number, at least 1"),
        ("ArcFaceLoss", {"distance": distances.LpDistance()}, "needs distance=CosineSimilarity"),
        ("CosFaceLoss", {"distance": distances.DotProductSimilarity()}, "needs distance=CosineSimilarity"),
        ("CosFaceLoss", {"scale": 0}, "scale must be above 0"),
        ("NormalizedSoftmaxLoss", {"temperature": 0}, "temperature must be above 0"),
        ("SphereFaceLoss", {"distance": distances.CosineSimilarity(p=1)}, r"CosineSimilarity\(p=2, power=1\)"),
        ("LargeMarginSoftmaxLoss", {"margin": 0.5}, "margin must be from 1 to 100"),
        ("SubCenterArcFaceLoss", {"sub_centers": 0}, "sub_centers must be above 0"),
        ("SoftTripleLoss", {"centers_per_class": 0}, "centers_per_class must be above 0"),
        ("SoftTripleLoss", {"gamma": 0.0}, "gamma must be above 0"),
        ("SoftTripleLoss", {"distance": distances.LpDistance()}, "wants a similarity"),
    ],
)
def test_bad_arguments_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(name, **arguments)


@pytest.mark.parametrize("name", ["ArcFaceLoss", "ProxyAnchorLoss", "SoftTripleLoss"])
def test_logits_are_of_embeddings_of_its_dimension(name: str) -> None:
    loss = ours(name)
    with pytest.raises(ValueError, match=rf"dimension {loss.embedding_size + 1}, but {name} was built with"):
        loss.get_logits(torch.randn(3, loss.embedding_size + 1))


def test_sub_centers_are_taken_by_position_too() -> None:
    loss = losses.SubCenterArcFaceLoss(5, 4, 20, 8, 2)
    assert (loss.num_classes, loss.embedding_size, loss.margin, loss.scale, loss.sub_centers) == (5, 4, 20, 8, 2)
    assert loss.W.shape == (4, 10)


@pytest.mark.parametrize("margin", range(1, 11))
def test_multiplied_angle_falls_all_the_way(margin: int) -> None:
    angles = torch.linspace(0, torch.pi, 2001, dtype=torch.float64)
    values = multiplied_angle(angles.cos(), margin)
    assert bool((values.diff() < 1e-9).all())
    same(values[[0, -1]], torch.tensor([1.0, 1 - 2 * margin], dtype=torch.float64))
    small = angles[angles < torch.pi / margin]
    same(multiplied_angle(small.cos(), margin), (margin * small).cos())


def test_equal_sub_centers_share_nothing(way: str) -> None:
    """The first of them gets the whole gradient, as one alone would."""
    loss, single = ours("SubCenterArcFaceLoss").double(), ours("ArcFaceLoss").double()
    loss.W.data.copy_(single.W.data.repeat_interleave(3, dim=1))
    value, of_embeddings, of_weights = answer(loss, *batch())
    wanted = answer(single, *batch())
    same([value, of_embeddings, of_weights[:, ::3]], wanted)
    assert not of_weights[:, 1::3].any()
    assert not of_weights[:, 2::3].any()


def outliers(loss: Any, threshold: float) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = loss.get_outliers(*batch(60), threshold)
    return found


@pytest.mark.parametrize("threshold", [30, 75, 100])
@pytest.mark.parametrize("at_once", [1, 100, 2**22])
def test_outliers_are_those_of_pml(monkeypatch: pytest.MonkeyPatch, threshold: float, at_once: int) -> None:
    monkeypatch.setattr(centers, "_GATHERED_AT_ONCE", at_once)
    mine, theirs = both("SubCenterArcFaceLoss")
    (places, dominant), (wanted, their_dominant) = (outliers(loss, threshold) for loss in (mine, theirs))
    assert places.dtype == torch.int64
    assert places.tolist() == wanted.tolist()
    same(dominant[:, : C - 1], their_dominant[:, : C - 1])
    assert not dominant[:, C - 1].any(), "no embedding is of the last class: PML returns what the memory held"


def test_outliers_come_alone_where_asked() -> None:
    """PML returns the centers all the same."""
    loss = ours("SubCenterArcFaceLoss")
    alone = loss.get_outliers(*batch(60, torch.float32), return_dominant_centers=False)
    assert torch.equal(alone, loss.get_outliers(*batch(60, torch.float32))[0])
    nobody = torch.zeros(0, D), torch.zeros(0, dtype=torch.int64)
    assert len(loss.get_outliers(*nobody, return_dominant_centers=False)) == 0
