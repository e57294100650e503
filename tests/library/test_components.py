"""Components: what they are built from, how they cross the wire, and how to write one's own."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import MISSING, field
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradbank
from gradbank import distances, engine, losses, miners, reducers, regularizers
from gradbank.component import Component, Spec, argument_fields, component, components, default_of
from gradbank.engine import Anchors, LogSumExp, Part, Statistic
from gradbank.errors import InvalidComponent, SessionConflict
from gradbank.wire import component_message, spec_of
from gradbank_server.build import build, build_loss

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


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    module = importlib.import_module("gradbank.component")  # the attribute of that name is the decorator
    monkeypatch.setattr(module, "_REGISTRY", components())


def sent(spec: Spec) -> Spec:
    """The spec as a server sees it, through the bytes of a message."""
    message = component_message(spec)
    return spec_of(type(message).FromString(message.SerializeToString()))


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
        (Spec("ArcFaceLoss", {"num_classes": 0, "embedding_size": 4}), "num_classes must be at least 1, got 0"),
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


# -- defaults ---------------------------------------------------------------------------------------------------------


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


# -- arguments that hold something ------------------------------------------------------------------------------------


@pytest.fixture
def several() -> type[Component]:
    """A component of components, as a list or by name, and of tensors."""

    @component
    class Several(losses.PairLoss):
        """The sum of what it holds."""

        parts: list[losses.Loss] | dict[str, losses.Loss]
        miners: "list[miners.Miner | None] | None" = None
        weights: Tensor | None = None
        bounds: tuple[float, float] | None = None
        order: int | Literal["all"] = "all"
        rate: float = 1.0
        names: tuple[str, ...] = ()

        def forward(self, embeddings: Tensor, labels: Tensor | None = None, *rest: Any) -> Tensor:
            inner = self.parts.values() if isinstance(self.parts, nn.ModuleDict) else self.parts
            made = torch.stack([part(embeddings, labels) for part in inner])
            return self.rate * (made if self.weights is None else made * self.weights.to(made)).sum()

    return Several


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_components_in_a_list_are_submodules(several: Any, kind: Any) -> None:
    inner = {"z": losses.ArcFaceLoss(3, 4), "a": losses.NTXentLoss(0.2), "m": losses.SupConLoss()}
    made = several(inner if kind is dict else kind(inner.values()), [None, miners.MultiSimilarityMiner(), None])
    assert [name for name, _ in made.named_parameters()] == ["parts.z.W" if kind is dict else "parts.0.W"]
    assert made.double().parts["z" if kind is dict else 0].W.dtype == torch.float64
    arguments = made.arguments()
    assert type(arguments["parts"]) is (dict if kind is dict else list)
    assert arguments["miners"][0] is None
    copy = made.rebuilt()
    assert copy.parts is not made.parts
    assert not {id(each) for each in copy.modules()} & {id(each) for each in made.modules()}
    back = build(sent(made.spec()))
    assert back.spec() == copy.spec() == made.spec()
    assert list(back.state_dict()) == list(copy.state_dict()) == list(made.state_dict())
    if kind is dict:
        assert list(back.arguments()["parts"]) == ["z", "a", "m"], "the order in which they are added up"
    assert repr(made).count("NTXentLoss") == 1
    made.parts = list(inner.values())[:2]
    assert len(made.arguments()["parts"]) == 2


def test_components_of_the_wrong_kind_in_a_list_are_refused(several: Any) -> None:
    spec = several([losses.NTXentLoss()], [miners.MultiSimilarityMiner()]).spec()
    spec.arguments["parts"][0] = Spec("MeanReducer", {})
    with pytest.raises(InvalidComponent, match=r"Several\.parts: .*instance of Loss"):
        build(sent(spec))
    spec.arguments["parts"][0] = Spec("NTXentLoss", {"temprature": 1})
    with pytest.raises(InvalidComponent, match=r"Several\.parts\[0\] has no argument 'temprature'"):
        build(sent(spec))


def test_a_tensor_is_an_argument_like_any_other(several: Any) -> None:
    weights = torch.tensor([0.5, torch.nan], dtype=torch.float64)
    made = several([losses.NTXentLoss(), losses.SupConLoss()], weights=weights)
    assert torch.equal(made.to(torch.float32).weights.isnan(), weights.isnan())
    assert made.weights.dtype == torch.float32, "it moves with the weights"
    assert "weights" not in made.state_dict(), "it is of the spec, and not of the state"
    built = build(sent(made.spec()))
    assert built.spec() == made.spec()
    assert not (made.spec() != built.spec())  # noqa: SIM202
    copy = made.rebuilt()
    copy.weights[0] = 2
    assert made.weights[0] == 0.5
    assert copy.spec() != made.spec()
    for other in (None, weights, torch.ones(3), [0.5, 1.0], 0.5):
        different = Spec("Several", {**made.spec().arguments, "weights": other})
        assert different != made.spec()
        assert made.spec() != different


def test_a_component_may_keep_an_argument_as_its_state() -> None:
    @component
    class Stateful(losses.ContrastiveLoss):
        centre: Any = 0.5

        def __post_init__(self) -> None:
            self.register_buffer("centre_seen", torch.zeros(1))
            del self.centre
            self.register_buffer("centre", torch.full((2,), 0.5))

    @component
    class Learned(losses.ContrastiveLoss):
        centre: Any = 0.5

        def __post_init__(self) -> None:
            self.centre = nn.Parameter(torch.full((2,), self.centre))

    made = Stateful()
    made.centre = torch.ones(2)
    assert "centre" in made.state_dict(), "as it was registered"
    assert [name for name, _ in Learned().named_parameters()] == ["centre"]
    with pytest.raises(TypeError, match="cannot assign"):
        Learned().centre = torch.ones(2)


def test_lists_and_tuples_of_specs_are_the_same() -> None:
    tensor = torch.ones(2)
    assert Spec("X", {"a": [1, (2, 3)], "t": [tensor]}) == Spec("X", {"a": (1, [2, 3]), "t": (tensor.clone(),)})
    assert Spec("X", {"a": [1, 2]}) != Spec("X", {"a": [1, 2, 3]})
    assert Spec("X", {"a": {"b": tensor}}) != Spec("X", {"a": {"c": tensor}})
    assert Spec("X", {"a": Spec("Y", {})}) != Spec("X", {"a": ["Y", {}]})
    assert Spec("X", {}) != ("X", {})


@pytest.mark.parametrize(
    ("given", "name", "wanted"),
    [
        ({"bounds": (0.1, 1)}, "bounds", (0.1, 1)),
        ({"bounds": [0, np.float32(0.5)]}, "bounds", (0, 0.5)),
        ({"rate": 2}, "rate", 2.0),
        ({"rate": np.float64(0.1)}, "rate", 0.1),
        ({"rate": np.float32(0.5)}, "rate", 0.5),
        ({"rate": np.int64(3)}, "rate", 3.0),
        ({"rate": torch.tensor(0.25)}, "rate", 0.25),
        ({"order": np.int32(4)}, "order", 4),
        ({"order": "all"}, "order", "all"),
        ({"names": ("a", "b")}, "names", ("a", "b")),
        ({"names": []}, "names", ()),
        ({"weights": np.array([1.0, 2.0])}, "weights", torch.tensor([1.0, 2.0], dtype=torch.float64)),
    ],
    ids=str,
)
def test_numbers_cross_whoever_made_them(several: Any, given: dict[str, Any], name: str, wanted: Any) -> None:
    built = build(sent(several([losses.NTXentLoss()], **given).spec()))
    got = getattr(built, name)
    assert torch.equal(got, wanted) if isinstance(wanted, Tensor) else (got == wanted and type(got) is type(wanted))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bounds": (0.1,)}, "Several.bounds: .*, got .0.1"),
        ({"bounds": (0.1, "far")}, "Several.bounds: .*valid number"),
        ({"order": "some"}, "Several.order"),
        ({"rate": np.bool_(True)}, "Several.rate"),
        ({"names": "ab"}, "Several.names: .*valid tuple"),
        ({"weights": "heavy"}, "Several.weights: .*instance of Tensor"),
        (
            {"parts": {1: losses.NTXentLoss().spec()}},
            "Several.parts has the key 1, and only strings can be sent as keys",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(several: Any, given: dict[str, Any], message: str) -> None:
    spec = several([losses.NTXentLoss()]).spec()
    with pytest.raises(InvalidComponent, match=message):
        build(sent(Spec("Several", {**spec.arguments, **given})))


@pytest.mark.parametrize("key", ["a.b", "", "items"])
def test_names_that_components_cannot_have_are_refused(several: Any, key: str) -> None:
    with pytest.raises(ValueError, match="components are given in a list, or by names: "):
        several({key: losses.NTXentLoss()})
    with pytest.raises(InvalidComponent, match=r"Several cannot be built: components are given"):
        build(sent(Spec("Several", {"parts": {key: losses.NTXentLoss().spec()}})))


def test_whatever_a_constructor_raises_is_a_bad_request() -> None:
    @component
    class Failing(losses.ContrastiveLoss):
        rows: int = 1

        def __post_init__(self) -> None:
            torch.empty(self.rows)

    with pytest.raises(InvalidComponent, match=r"Failing cannot be built: RuntimeError: .*negative dimension"):
        build(sent(Spec("Failing", {"rows": -1})))


def test_an_argument_that_cannot_be_checked_is_refused() -> None:
    @component
    class Odd(losses.ContrastiveLoss):
        when: torch.Generator | None = None

    @component
    class Unknown(losses.ContrastiveLoss):
        what: "Nowhere | None" = None  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(InvalidComponent, match=r"Odd\.when is declared as .*Generator.*, which cannot be checked"):
        build(sent(Spec("Odd", {"when": 1})))
    with pytest.raises(InvalidComponent, match=r"Unknown cannot be built: .*'Nowhere' is not defined"):
        build(sent(Unknown().spec()))


def test_a_session_of_tensors_is_joined_by_an_equal_loss(several: Any, embedded: gradbank.Client, name: str) -> None:
    def loss(*weights: float) -> Any:
        parts = {"z": losses.NTXentLoss(), "a": losses.SupConLoss(), "m": losses.ContrastiveLoss()}
        return several(parts, weights=torch.tensor(weights), bounds=(0, 1))

    batch = torch.randn(8, 4), torch.arange(8) % 3
    first = embedded.open(name, loss(0.1, 0.2, 0.7))
    second = embedded.open(name, loss(0.1, 0.2, 0.7), rank=1)
    assert torch.equal(first(*batch), loss(0.1, 0.2, 0.7)(*batch))
    assert torch.equal(second(*batch), first(*batch))
    with pytest.raises(SessionConflict, match=r"weights is tensor\(\[0.1"):
        embedded.open(name, loss(0.1, 0.2, 0.6), rank=2)
    other = loss(0.1, 0.2, 0.7)
    other.parts["a"] = losses.SupConLoss(0.5)
    with pytest.raises(SessionConflict, match=r"parts\['a'\]\.temperature is 0.1 there, and 0.5 here"):
        embedded.open(name, other, rank=2)
    assert first.local().spec() == loss(0.1, 0.2, 0.7).spec()
    embedded.close_session(name)


# -- components of a user's own ---------------------------------------------------------------------------------------


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

        def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
            return {"near": LogSumExp(lambda s: self.distance.closeness(s) / self.temperature)}

        def terms(self, anchors: Anchors) -> Mapping[str, Part]:
            far = anchors.logsumexp(-self.distance.closeness(anchors.s) / self.temperature)
            losses = torch.logaddexp(far + anchors.found["near"].value, torch.zeros(anchors.size))
            return {"loss": anchors.per_anchor(losses)}

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


def test_a_class_whose_arguments_a_server_cannot_be_told_is_not_hosted() -> None:
    @component
    class Rescaled(losses.BaseMetricLossFunction):
        def __init__(self, scale: float = 2.0, **more: Any) -> None:
            super().__init__(**more)
            self.scale = scale

    with gradbank.connect("local://") as client:
        with pytest.raises(
            TypeError, match=r"Rescaled.__init__ takes scale, of which a server cannot be told: declare"
        ):
            client.open("own", Rescaled(3.0))
        assert client.sessions() == []
