"""Components: what they are built from, how they cross the wire, and how to write one's own."""

from dataclasses import MISSING
from typing import Any

import pytest
import torch

from gradbank import distances, losses, miners, reducers, regularizers
from gradbank.arguments import argument_fields, default_of
from gradbank.component import Component, component, components
from gradbank.errors import InvalidComponent
from gradbank.spec import Spec
from gradbank.wire import component_message, spec_of
from gradbank_server.build import build, build_loss

from .conftest import sent

EXAMPLES: list[Component] = [
    losses.ArcFaceLoss(3, 4, margin=10, weight_regularizer=regularizers.LpRegularizer(p=1), weight_reg_weight=0.5),
    losses.ContrastiveLoss(pos_margin=0.25, distance=distances.LpDistance(p=1, power=2)),
    losses.CrossBatchMemory(losses.SupConLoss(0.2), 8, 16, miner=miners.MultiSimilarityMiner(0.3)),
    losses.MultiSimilarityLoss(alpha=3, base=0.25),
    losses.NTXentLoss(0.5, embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=2),
    losses.TripletMarginLoss(0.1, reducer=reducers.ThresholdReducer(low=0.05)),
    distances.CosineSimilarity(power=2),
    distances.DotProductSimilarity(normalize_embeddings=False),
    distances.LpDistance(p=3),
    miners.MultiSimilarityMiner(distance=distances.DotProductSimilarity()),
    reducers.ThresholdReducer(high=2.5),
    regularizers.LpRegularizer(power=3, reducer=reducers.AvgNonZeroReducer()),
]

# what a component without an example above is given, where it must be given something
REQUIRED: dict[str, Any] = {
    "K": 3,
    "Tn": 2.0,
    "centers_per_class": 2,
    "descriptors_dim": 4,
    "distance": distances.LpDistance(),
    "embedding_size": 4,
    "l": 4,
    "loss": losses.NTXentLoss(),
    "losses": [losses.ContrastiveLoss(), losses.ArcFaceLoss(3, 4)],
    "margin": 0.5,
    "num_classes": 3,
    "reducers": {"pos_loss": reducers.MeanReducer(), "neg_loss": reducers.ThresholdReducer(low=0.1)},
    "weights": torch.linspace(1, 2, 3),
}


def example_of(cls: type[Component]) -> Component:
    """One with arguments that are not the defaults, or else with those that it must be given."""
    found = [each for each in EXAMPLES if type(each) is cls]
    needed = [each.name for each in argument_fields(cls) if default_of(each) is MISSING]
    return found[0] if found else cls(**{name: REQUIRED[name] for name in needed})


def of_gradbank() -> list[type[Component]]:
    return [cls for cls in components().values() if cls.__module__.startswith("gradbank.")]


@pytest.mark.parametrize("cls", of_gradbank(), ids=lambda cls: cls.__name__)
def test_component_is_built_again_from_its_spec(cls: type[Component]) -> None:
    example = example_of(cls)
    built = build(sent(example.spec()))
    assert type(built) is type(example)
    assert built.spec() == example.spec()
    assert repr(build(sent(built.spec()))) == repr(built)
    assert example.rebuilt().spec() == example.spec()
    assert list(built.state_dict()) == list(example.state_dict())


@pytest.mark.parametrize("cls", of_gradbank(), ids=lambda cls: cls.__name__)
def test_component_is_compared_without_its_weights(cls: type[Component]) -> None:
    """As a server does, to see whether a session is the one that was asked for."""
    example = example_of(cls)
    spec = sent(example.spec())
    with torch.device("meta"):
        compared = build(spec)
    assert compared.spec() == example.spec()


def test_building_leaves_the_classes_as_they_were() -> None:
    """A default that comes to lie on a class hides the module of that name in every instance."""
    classes = {base for each in components().values() for base in each.__mro__ if issubclass(base, Component)}
    before = {each: set(vars(each)) for each in classes}
    for cls in of_gradbank():
        build(sent(example_of(cls).spec()))
    assert {each: set(vars(each)) for each in classes} == before
    loss = losses.NTXentLoss(embedding_regularizer=regularizers.LpRegularizer())
    assert loss.embedding_regularizer is not None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec("NTXentLos", {}), "no component is named 'NTXentLos'; did you mean 'NTXentLoss'"),
        (
            Spec("MyLoss", {}),
            r"no component is named 'MyLoss'.* --components \(GRADBANK_COMPONENTS\) naming their package",
        ),
        (Spec("Zzz", {}), r"no component is named 'Zzz'; known are A\w+, "),
        (Spec("NTXentLoss", {"temprature": 1.0}), "no argument 'temprature'; did you mean 'temperature'"),
        (Spec("NTXentLoss", {"temperature": "hot"}), "NTXentLoss.temperature: .*valid number, got 'hot'"),
        (Spec("NTXentLoss", {"temperature": True}), "NTXentLoss.temperature"),
        (Spec("NTXentLoss", {"temperature": torch.ones(2)}), r"number, got a tensor of shape \(2,\) and torch.float32"),
        (Spec("NTXentLoss", {"distance": 2}), "NTXentLoss.distance: .*instance of Distance, got 2"),
        (Spec("NTXentLoss", {"distance": Spec("MeanReducer", {})}), "instance of Distance, got MeanReducer"),
        (Spec("NTXentLoss", {"distance": Spec("LpDistance", {"q": 1})}), "NTXentLoss.distance has no argument 'q'"),
        (Spec("LpDistance", {"normalize_embeddings": 1}), "LpDistance.normalize_embeddings"),
        (Spec("ArcFaceLoss", {"num_classes": 3}), "ArcFaceLoss cannot be built: .*embedding_size"),
        (Spec("ArcFaceLoss", {"num_classes": 3.5, "embedding_size": 4}), "ArcFaceLoss.num_classes: .*integer"),
        (Spec("ArcFaceLoss", {"num_classes": 0, "embedding_size": 4}), "num_classes must be a whole .* got 0"),
        (Spec("ThresholdReducer", {}), "at least one of low and high"),
        (Spec("TripletMarginLoss", {"triplets_per_anchor": "some"}), "TripletMarginLoss.triplets_per_anchor"),
        (
            Spec("TripletMarginLoss", {"triplets_per_anchor": 0}),
            "TripletMarginLoss cannot be built: triplets_",
        ),
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
    with pytest.raises(InvalidComponent, match="16 deep"):
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
