"""What tests of components share: a registry of their own, and a spec as it arrives."""

import importlib

import pytest

from gradbank.component import components
from gradbank.spec import Spec
from gradbank.wire import component_message, spec_of


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten after it."""
    module = importlib.import_module("gradbank.component")  # the attribute of that name is the decorator
    monkeypatch.setattr(module, "_REGISTRY", components())


def sent(spec: Spec) -> Spec:
    """The spec as a server sees it, through the bytes of a message."""
    message = component_message(spec)
    return spec_of(type(message).FromString(message.SerializeToString()))
