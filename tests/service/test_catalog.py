"""The catalog: every component with its kind, its arguments as they are written, and its paper."""

import importlib
from dataclasses import field
from typing import Literal

import pytest

import gradbank
from gradbank import distances, losses, reducers
from gradbank.component import Component, component, components, foundation
from gradbank.remote.stats import ComponentInfo
from gradbank_server.service.catalog import component_infos, kind_of


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(importlib.import_module("gradbank.component"), "_REGISTRY", components())


def info(name: str) -> ComponentInfo:
    return next(ComponentInfo.of(each) for each in component_infos() if each.name == name)


def test_every_component_is_listed_by_name(client: gradbank.Client) -> None:
    listed = client.catalog()
    assert [each.name for each in listed] == sorted(components())
    for each in listed:
        assert each.documentation, each.name
        assert each.kind in ("loss", "distance", "miner", "reducer", "regularizer"), each.name
        assert all(type_ for _, type_, _ in each.arguments), each.name


def test_every_paper_of_a_docstring_is_found() -> None:
    for each in map(ComponentInfo.of, component_infos()):
        assert "et al.," not in each.documentation, f'{each.name}: a citation reads Authors, "Title", VENUE YEAR.'
        assert all(line.count(', "') == 1 for line in each.paper.splitlines()), each.name
    assert info("SupConLoss").paper.startswith("Khosla et al., ")
    assert info("MeanReducer").paper == ""


def test_arguments_are_written_as_they_would_be_in_python() -> None:
    @component
    class Written(losses.ContrastiveLoss):
        """Something. Somewhere."""

        needed: int = field(kw_only=True)
        strategy: Literal["a.b", "c"] = "c"
        distance: distances.Distance = field(default_factory=lambda: distances.LpDistance(p=1), kw_only=True)
        reducer: reducers.Reducer = field(default_factory=lambda: reducers.ThresholdReducer(low=0.5), kw_only=True)
        secret: object = field(default=print, kw_only=True, metadata={"wire": False})

    arguments = {name: (type_, default) for name, type_, default in info("Written").arguments}
    assert arguments["needed"] == ("int", None)
    assert arguments["strategy"] == ("Literal['a.b', 'c']", "'c'")
    assert arguments["distance"] == ("Distance", "LpDistance(p=1)")
    assert arguments["reducer"] == ("Reducer", "ThresholdReducer(low=0.5)")
    assert arguments["embedding_regularizer"] == ("Regularizer | None", "None")
    assert "secret" not in arguments
    assert next(iter(arguments)) == "pos_margin", "positional ones come first"


def test_a_default_that_a_class_makes_itself_is_named() -> None:
    @component
    class Cosine(losses.ContrastiveLoss):
        def get_default_distance(self) -> distances.Distance:
            return distances.CosineSimilarity()

    assert ("distance", "Distance", "get_default_distance()") in info("Cosine").arguments
    assert (info("Cosine").documentation, info("Cosine").paper) == ("", ""), "a signature is no documentation"


def test_kinds_follow_base_classes() -> None:
    @foundation
    class Sampler(Component):
        """Chooses."""

    @component
    class Uniform(Sampler):
        """Chooses evenly."""

    @component
    class Alone(Component):
        """Is of no kind."""

    class Wrapper(losses.Loss):
        """Around a loss."""

    assert [kind_of(cls) for cls in (Uniform, Alone, Wrapper)] == ["sampler", "component", "loss"]
    assert kind_of(losses.CrossBatchMemory) == "loss"
    assert info("Uniform").kind == "sampler"
    assert info("Alone").kind == "component"


def test_several_papers_are_several_lines() -> None:
    @component
    class Compiled(losses.ContrastiveLoss):
        """Both.

            loss = "a" + 1

        The "first" of them, 2001, is no citation.

        Doe et al., "One: Two, or
        Three", CVPR 2019.

        Roe, "Four", 2020;
        Poe, "Five", NIPS 2021.
        """

    assert info("Compiled").paper.splitlines() == [
        'Doe et al., "One: Two, or Three", CVPR 2019.',
        'Roe, "Four", 2020',
        'Poe, "Five", NIPS 2021.',
    ]
    assert info("Compiled").documentation.splitlines()[-1] == 'The "first" of them, 2001, is no citation.'
