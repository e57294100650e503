"""Arguments that hold something: lists, dictionaries, tensors and components, here and over the wire."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from torch import Tensor, nn

import gradbank
from gradbank import losses, miners
from gradbank.component import Component, component
from gradbank.errors import InvalidComponent, SessionConflict
from gradbank.spec import Spec
from gradbank_server.build import build

from .conftest import sent


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


@pytest.mark.parametrize(
    ("make", "name", "given"),
    [
        (lambda library, _: library.ArcFaceLoss(3, 8), "margin", 20.0),
        (lambda library, _: library.SubCenterArcFaceLoss(num_classes=3, embedding_size=8), "margin", 20.0),
        (lambda library, _: library.TupletMarginLoss(), "margin", 3.0),
        (lambda _, mining: mining.AngularMiner(), "angle", 25.0),
    ],
)
def test_an_angle_is_an_attribute_in_degrees_as_it_is_given(make: Any, name: str, given: float) -> None:
    """PML holds it in radians."""
    made, torch_state = [], torch.get_rng_state()
    for library, mining, angle in (
        (losses, miners, given),
        (pml_losses, pml_miners, math.radians(given)),
    ):
        torch.set_rng_state(torch_state)
        each = make(library, mining)
        setattr(each, name, angle)
        generator = torch.Generator().manual_seed(0)
        answer = each(torch.randn(12, 8, generator=generator), torch.arange(12) % 3)
        made.append(len(answer[0]) if name == "angle" else answer)
    torch.testing.assert_close(made[0], made[1])
