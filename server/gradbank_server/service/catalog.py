"""What can be built, described."""

import dataclasses
import inspect

from gradbank.component import Component, argument_fields, components, is_sent
from gradbank.distances import Distance
from gradbank.losses.base import Loss
from gradbank.miners.base import Miner
from gradbank.reducers import Reducer
from gradbank.regularizers import Regularizer
from gradbank.v1 import catalog_pb2

_KINDS: dict[str, type[Component]] = {
    "loss": Loss,
    "distance": Distance,
    "miner": Miner,
    "reducer": Reducer,
    "regularizer": Regularizer,
}


def component_infos() -> list[catalog_pb2.ComponentInfo]:
    """Every component, by name."""
    return [_info(cls) for cls in components().values()]


def _info(cls: type[Component]) -> catalog_pb2.ComponentInfo:
    kind = next(name for name, base in _KINDS.items() if issubclass(cls, base))
    arguments = [_argument(each) for each in argument_fields(cls) if is_sent(each)]
    return catalog_pb2.ComponentInfo(
        name=cls.__name__, kind=kind, documentation=inspect.getdoc(cls) or "", arguments=arguments
    )


def _argument(each: "dataclasses.Field[object]") -> catalog_pb2.ArgumentInfo:
    named = each.type if isinstance(each.type, str) else inspect.formatannotation(each.type)
    info = catalog_pb2.ArgumentInfo(name=each.name, type=named)
    if each.default is not dataclasses.MISSING:
        info.default = repr(each.default)
    elif each.default_factory is not dataclasses.MISSING:
        info.default = repr(each.default_factory())
    return info
