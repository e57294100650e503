"""What can be built, described."""

import dataclasses
import inspect
import re

from gradbank.arguments import argument_fields, default_method, default_of, is_sent
from gradbank.component import Component, components
from gradbank.distances import Distance
from gradbank.losses.loss import Loss
from gradbank.miners.base import Miner
from gradbank.reducers import Reducer
from gradbank.regularizers import Regularizer
from gradbank.v1 import catalog_pb2

_KINDS = (Loss, Distance, Miner, Reducer, Regularizer)
_PAPER = re.compile(r'[A-Z][^"]+, "[^"]+", .*\b(19|20)\d\d\b[^"]*')  # Authors, "Title", Venue Year.
_NEXT = re.compile(r"(?<=\d{4}); ")
_MODULE = re.compile(r"(?<!['\"\w.])(?:[A-Za-z_]\w*\.)+")  # of a type, which is read without


def component_infos() -> list[catalog_pb2.ComponentInfo]:
    """Every component, by name."""
    return [_info(cls) for cls in components().values()]


def kind_of(cls: type[Component]) -> str:
    """The base class that components of this kind have in common, in lower case."""
    for base in _KINDS:
        if issubclass(cls, base):
            return base.__name__.lower()
    first = next(base for base in reversed(cls.__mro__) if issubclass(base, Component) and base is not Component)
    return "component" if first is cls else first.__name__.lower()


def _info(cls: type[Component]) -> catalog_pb2.ComponentInfo:
    documentation, paper = _documentation(cls)
    arguments = [_argument(cls, each) for each in argument_fields(cls) if is_sent(each)]
    return catalog_pb2.ComponentInfo(
        name=cls.__name__, kind=kind_of(cls), documentation=documentation, arguments=arguments, paper=paper
    )


def _documentation(cls: type[Component]) -> tuple[str, str]:
    """The docstring without the paragraphs that name a paper, and those, each on a line."""
    text = inspect.cleandoc(cls.__doc__ or "")
    if text.startswith(f"{cls.__name__}("):  # a dataclass without a docstring gets its signature for one
        return "", ""
    paragraphs = [(part, " ".join(part.split())) for part in text.split("\n\n")]
    prose = [part for part, line in paragraphs if not _PAPER.fullmatch(line)]
    papers = [_NEXT.sub("\n", line) for _, line in paragraphs if _PAPER.fullmatch(line)]
    return "\n\n".join(prose), "\n".join(papers)


def _argument(cls: type[Component], each: "dataclasses.Field[object]") -> catalog_pb2.ArgumentInfo:
    named = each.type if isinstance(each.type, str) else inspect.formatannotation(each.type)
    info = catalog_pb2.ArgumentInfo(name=each.name, type=_MODULE.sub("", named))
    default = default_of(each)
    if default_method(cls, each.name) is not None:
        info.default = f"get_default_{each.name}()"  # a method of the component, which there is none of here
    elif default is not dataclasses.MISSING:
        info.default = _written(default)
    return info


def _written(value: object) -> str:
    """A value as it would be written, a component with the arguments that are not at their defaults."""
    if not isinstance(value, Component):
        return repr(value)
    given = value.arguments()
    fields = [each for each in argument_fields(type(value)) if is_sent(each)]
    written = {each.name: (_written(given[each.name]), _written(default_of(each))) for each in fields}
    shown = [f"{name}={text}" for name, (text, default) in written.items() if text != default]
    return f"{type(value).__name__}({', '.join(shown)})"
