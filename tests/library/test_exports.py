"""What the library offers: everything public is exported, named once, and documented."""

import importlib
import inspect
import pkgutil
import re
from types import ModuleType

import pytest

import gradbank
from gradbank import losses
from gradbank.component import components

PACKAGES = (
    "gradbank",
    "gradbank.distances",
    "gradbank.engine",
    "gradbank.evaluation",
    "gradbank.losses",
    "gradbank.miners",
    "gradbank.reducers",
    "gradbank.remote",
    "gradbank.samplers",
    "gradbank.wire",
    "gradbank.wrappers",
)
MODULES = ("gradbank.errors", "gradbank.regularizers")  # that users import from
WITHOUT_PAPER = (
    "BaseLossWrapper",
    "BaseMetricLossFunction",
    "EmbeddingRegularizerMixin",
    "GenericPairLoss",
    "Loss",
    "MultipleLosses",
    "PairLoss",
    "SelfSupervisedLossWrapper",
    "Staged",
    "WeightRegularizerMixin",
)


def modules() -> list[ModuleType]:
    """Every module of the library but the generated ones."""
    names = [found.name for found in pkgutil.walk_packages(gradbank.__path__, "gradbank.")]
    return [gradbank, *(importlib.import_module(name) for name in names if not name.startswith("gradbank.v1"))]


def public_classes() -> list[type]:
    return [
        each
        for module in modules()
        for name, each in vars(module).items()
        if inspect.isclass(each) and each.__module__ == module.__name__ and not name.startswith("_")
    ]


@pytest.mark.parametrize("name", PACKAGES)
def test_exports_are_what_the_package_holds(name: str) -> None:
    package = importlib.import_module(name)
    held = {
        each
        for each, value in vars(package).items()
        if inspect.isclass(value) and not each.startswith("_") and value.__module__.startswith("gradbank")
    }
    assert held <= set(package.__all__)
    assert all(hasattr(package, each) for each in package.__all__)
    assert len(set(package.__all__)) == len(package.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_users_import_from_export_what_they_define(name: str) -> None:
    module = importlib.import_module(name)
    defined = {
        each
        for each, value in vars(module).items()
        if getattr(value, "__module__", "") == name and not each.startswith("_")
    }
    assert defined <= set(module.__all__)
    assert all(getattr(module, each).__module__ == name for each in module.__all__)


def test_every_package_is_known_to_these_tests() -> None:
    listing = {module.__name__ for module in modules() if hasattr(module, "__path__")}
    assert listing == set(PACKAGES)


def test_every_component_is_exported_where_users_look() -> None:
    places = [gradbank.losses, gradbank.miners, gradbank.distances, gradbank.reducers, gradbank.regularizers]
    for name, made in components().items():
        if made.__module__.startswith("gradbank."):
            assert any(getattr(place, name, None) is made for place in places), name


def test_every_public_class_says_what_it_is() -> None:
    found = public_classes()
    assert len(found) > 40
    for each in found:
        text = each.__dict__.get("__doc__") or ""
        # a dataclass without a docstring gets its signature for one
        assert text.strip(), f"{each.__module__}.{each.__name__} has no docstring"
        assert not text.startswith(f"{each.__name__}("), f"{each.__module__}.{each.__name__} has no docstring"


def test_every_module_says_what_it_is() -> None:
    for module in modules():
        assert (module.__doc__ or "").strip(), f"{module.__name__} has no docstring"


@pytest.mark.parametrize("name", sorted(set(losses.__all__) - set(WITHOUT_PAPER)))
def test_loss_names_its_paper_and_its_formula(name: str) -> None:
    text = inspect.getdoc(getattr(losses, name)) or ""
    authors = r"(^|\s)[A-Z][\w'-]+( et al\.|( and|,) [A-Z][\w'-]+)*"
    assert re.search(authors + r', "[^"]+",\s+(\w+(/\w+)?[ ]){0,3}(19|20)\d\d', text, re.M), text
    if name not in ("CrossBatchMemory", "SelfSupervisedLoss"):  # which compute what their inner loss does
        assert re.search(r"^    +\S.* = ", text, re.M), text


def test_public_methods_say_what_they_do() -> None:
    places = ("gradbank.losses", "gradbank.memory", "gradbank.miners", "gradbank.distances", "gradbank.remote.client")
    silent = [
        f"{each.__name__}.{name}"
        for each in public_classes()
        if each.__module__.startswith(places)
        for name, method in vars(each).items()
        if inspect.isfunction(method) and method.__module__ == each.__module__ and not name.startswith("_")
        if not method.__doc__ and not any(hasattr(base, name) for base in each.__mro__[1:])
    ]
    assert silent == []
