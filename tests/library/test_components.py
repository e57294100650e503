"""Components: what they are built from, how they cross the wire, and how to write one's own."""

import importlib
from collections.abc import Mapping
from dataclasses import field
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import distances, engine, losses, miners, reducers, regularizers
from gradbank.component import Component, Spec, component, components
from gradbank.engine import Anchors, LogSumExp, Statistic
from gradbank.errors import InvalidComponent
from gradbank.reducers import Ratio
from gradbank.wire import component_message, spec_of
from gradbank_server.build import build, build_loss

EXAMPLES: list[Component] = [
    losses.ArcFaceLoss(3, 4, margin=10, weight_regularizer=regularizers.LpRegularizer(p=1), weight_reg_weight=0.5),
    losses.ContrastiveLoss(pos_margin=0.25, distance=distances.LpDistance(p=1, power=2)),
    losses.CrossBatchMemory(losses.SupConLoss(0.2), 8, 16, miner=miners.MultiSimilarityMiner(0.3)),
    losses.MultiSimilarityLoss(alpha=3, base=0.25),
    losses.NTXentLoss(0.5, embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=2),
    losses.SupConLoss(0.2),
    losses.TripletMarginLoss(0.1, reducer=reducers.ThresholdReducer(low=0.05)),
    distances.CosineSimilarity(power=2),
    distances.DotProductSimilarity(normalize_embeddings=False),
    distances.LpDistance(p=3),
    miners.MultiSimilarityMiner(distance=distances.DotProductSimilarity()),
    reducers.AvgNonZeroReducer(),
    reducers.MeanReducer(),
    reducers.ThresholdReducer(high=2.5),
    regularizers.LpRegularizer(power=3, reducer=reducers.AvgNonZeroReducer()),
]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    module = importlib.import_module("gradbank.component")  # the attribute of that name is the decorator
    monkeypatch.setattr(module, "_REGISTRY", components())


def sent(spec: Spec) -> Spec:
    """The spec as a server sees it, through the bytes of a message."""
    message = component_message(spec)
    return spec_of(type(message).FromString(message.SerializeToString()))


def test_every_component_has_an_example() -> None:
    assert {type(example).__name__ for example in EXAMPLES} == set(components())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_component_is_built_again_from_its_spec(example: Component) -> None:
    built = build(sent(example.spec()))
    assert type(built) is type(example)
    assert built.spec() == example.spec()
    assert repr(build(sent(built.spec()))) == repr(built)
    assert example.rebuilt().spec() == example.spec()
    assert list(built.state_dict()) == list(example.state_dict())


def test_building_leaves_the_classes_as_they_were() -> None:
    """A default that comes to lie on a class hides the module of that name in every instance."""
    classes = {base for each in components().values() for base in each.__mro__ if issubclass(base, Component)}
    before = {each: set(vars(each)) for each in classes}
    for example in EXAMPLES:
        build(sent(example.spec()))
    assert {each: set(vars(each)) for each in classes} == before
    loss = losses.NTXentLoss(embedding_regularizer=regularizers.LpRegularizer())
    assert loss.embedding_regularizer is not None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec("NTXentLos", {}), "no component is named 'NTXentLos'; did you mean 'NTXentLoss'"),
        (Spec("Zzz", {}), "no component is named 'Zzz'; known are ArcFaceLoss, "),
        (Spec("NTXentLoss", {"temprature": 1.0}), "no argument 'temprature'; did you mean 'temperature'"),
        (Spec("NTXentLoss", {"temperature": "hot"}), "NTXentLoss.temperature: .*valid number, got 'hot'"),
        (Spec("NTXentLoss", {"temperature": True}), "NTXentLoss.temperature"),
        (Spec("NTXentLoss", {"distance": 2}), "NTXentLoss.distance: .*instance of Distance, got 2"),
        (Spec("NTXentLoss", {"distance": Spec("MeanReducer", {})}), "instance of Distance, got MeanReducer"),
        (Spec("NTXentLoss", {"distance": Spec("LpDistance", {"q": 1})}), "NTXentLoss.distance has no argument 'q'"),
        (Spec("LpDistance", {"normalize_embeddings": 1}), "LpDistance.normalize_embeddings"),
        (Spec("ArcFaceLoss", {"num_classes": 3}), "ArcFaceLoss cannot be built: .*embedding_size"),
        (Spec("ArcFaceLoss", {"num_classes": 3.5, "embedding_size": 4}), "ArcFaceLoss.num_classes: .*integer"),
        (Spec("ArcFaceLoss", {"num_classes": 0, "embedding_size": 4}), "num_classes must be at least 1, got 0"),
        (Spec("ThresholdReducer", {}), "at least one of low and high"),
        (Spec("TripletMarginLoss", {"triplets_per_anchor": "some"}), "TripletMarginLoss.triplets_per_anchor"),
        (Spec("TripletMarginLoss", {"swap": True}), "swap=False only, got True"),
    ],
)
def test_spec_that_does_not_fit_names_what_would(spec: Spec, message: str) -> None:
    with pytest.raises(InvalidComponent, match=message):
        build(sent(spec))


def test_only_a_loss_is_hosted() -> None:
    with pytest.raises(InvalidComponent, match="a session holds a loss, and MeanReducer is not one"):
        build_loss(reducers.MeanReducer().spec())


def test_components_nested_too_deeply_are_refused() -> None:
    spec = Spec("MeanReducer", {})
    for _ in range(20):
        spec = Spec("LpRegularizer", {"reducer": spec})
    with pytest.raises(InvalidComponent, match="8 deep"):
        spec_of(component_message(spec))


def test_function_cannot_be_sent() -> None:
    with pytest.raises(InvalidComponent, match=r"NTXentLoss.temperature is a .*function.*, which cannot be sent"):
        component_message(Spec("NTXentLoss", {"temperature": print}))
    quiet = losses.ArcFaceLoss(3, 4, weight_init_func=torch.nn.init.zeros_)
    assert not quiet.W.any()
    assert "weight_init_func" not in quiet.spec().arguments  # its result is sent: the weights


def test_arguments_come_in_the_order_of_pml() -> None:
    assert losses.ContrastiveLoss(0.1, 0.2).arguments().items() >= {"pos_margin": 0.1, "neg_margin": 0.2}.items()
    assert losses.MultiSimilarityLoss(1, 2, 3).arguments().items() >= {"alpha": 1, "beta": 2, "base": 3}.items()
    assert losses.NTXentLoss(0.3).temperature == losses.SupConLoss(0.3).temperature == 0.3
    triplet = losses.TripletMarginLoss(0.1, False, False, "all")
    assert (triplet.margin, triplet.triplets_per_anchor) == (0.1, "all")
    arc = losses.ArcFaceLoss(5, 8, 10.0, 32.0)
    assert (arc.num_classes, arc.embedding_size, arc.margin, arc.scale, arc.W.shape) == (5, 8, 10, 32, (8, 5))
    inner, miner = losses.NTXentLoss(), miners.MultiSimilarityMiner(0.2)
    queue = losses.CrossBatchMemory(inner, 8, 16, miner)
    assert (queue.loss, queue.embedding_size, queue.memory_size, queue.miner) == (inner, 8, 16, miner)
    assert (reducers.ThresholdReducer(1, 2).bounds, regularizers.LpRegularizer(1, 2).power) == ((1, 2), 2)
    with pytest.raises(TypeError, match="positional"):
        losses.NTXentLoss(0.1, distances.LpDistance())  # type: ignore[misc]


def test_repr_shows_what_was_given() -> None:
    shown = repr(losses.CrossBatchMemory(losses.NTXentLoss(0.5), 8, memory_size=16))
    for part in ("CrossBatchMemory", "embedding_size=8, memory_size=16", "NTXentLoss", "temperature=0.5"):
        assert part in shown
    assert "miner" not in shown


def test_two_components_of_one_name_are_refused() -> None:
    with pytest.raises(TypeError, match=r"two components are called NTXentLoss: one in gradbank\.losses\.softmax"):
        component(type("NTXentLoss", (losses.PairLoss,), {"__module__": __name__, "__annotations__": {}}))
    assert components()["NTXentLoss"] is losses.NTXentLoss


def test_class_without_a_name_on_the_wire_cannot_be_sent() -> None:
    class Unregistered(losses.NTXentLoss):
        pass

    with pytest.raises(TypeError, match="Unregistered is not a registered component: decorate it with @component"):
        Unregistered().spec()


@pytest.fixture
def own() -> tuple[type[distances.Distance], type[losses.PairLoss]]:
    """A distance and a loss, as a user would write them."""

    @component
    class MahalanobisDistance(distances.Distance):
        """A distance whose axes weigh differently."""

        weight: float = 2.0

        def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
            scale = torch.linspace(1, self.weight, query_emb.shape[-1], dtype=query_emb.dtype)
            return torch.cdist(query_emb * scale, ref_emb * scale)

    @component
    class SoftNearestLoss(losses.PairLoss):
        """`log(1 + sum_p exp(-s) sum_n exp(s))` for each anchor."""

        temperature: float = 0.5
        distance: distances.Distance = field(default_factory=MahalanobisDistance, kw_only=True)

        def negatives(self) -> Mapping[str, Statistic]:
            return {"near": LogSumExp(lambda s: self.distance.closeness(s) / self.temperature)}

        def terms(self, anchors: Anchors) -> Mapping[str, Ratio]:
            far = anchors.logsumexp(-self.distance.closeness(anchors.positives.s) / self.temperature)
            return {"loss": self.reducer(torch.logaddexp(far + anchors.found["near"].value, torch.zeros(anchors.size)))}

    return MahalanobisDistance, SoftNearestLoss


def value_and_gradient(loss: Any, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, labels)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def test_own_loss_and_distance_work_everywhere(own: Any, embedded: gradbank.Client, name: str) -> None:
    own_distance, own_loss = own
    torch.manual_seed(0)
    embeddings, labels = torch.randn(12, 4), torch.randint(3, (12,))
    loss = own_loss(0.3, distance=own_distance(weight=3.0))
    mat = loss.distance(embeddings) / 0.3
    same, own_row = labels[:, None] == labels, torch.eye(12, dtype=torch.bool)
    wanted = [
        torch.log1p(mat[a][same[a] & ~own_row[a]].exp().sum() * (-mat[a][~same[a]]).exp().sum()) for a in range(12)
    ]
    with engine.using("dense"):
        dense = value_and_gradient(loss, embeddings, labels)
    torch.testing.assert_close(dense[0], torch.stack(wanted).mean(), rtol=1e-5, atol=0)
    with engine.using("tiled", engine.Bounds(tile=9, rows=2, positives=3)):
        torch.testing.assert_close(value_and_gradient(loss, embeddings, labels), dense, rtol=1e-4, atol=1e-6)
    bank = losses.CrossBatchMemory(loss, 4, 30, miners.MultiSimilarityMiner(distance=own_distance()))
    assert build(sent(bank.spec())).spec() == bank.spec()
    remote = embedded.open(name, bank)
    for _ in range(5):
        batch = torch.randn(8, 4), torch.randint(3, (8,))
        assert all(map(torch.equal, value_and_gradient(remote, *batch), value_and_gradient(bank, *batch)))
    embedded.close_session(name)
