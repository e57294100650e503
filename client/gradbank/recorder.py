"""Components that write down statistics of their last call."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from gradbank.component import Component, foundation


@foundation
class Recorder(Component):
    """A component with statistics: its fields that no argument sets and that are 0 or None by default.

    Those that are None are only written if they are asked for, and are 0 from then until the first call. A class of
    your own may name its statistics in its constructor instead: see `add_to_recordable_attributes`.

    Args:
        collect_stats: whether a call also writes the statistics that the class names; None is no.
    """

    collect_stats: bool | None = field(default=None, kw_only=True)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "collect_stats" and value:
            self.reset_stats()

    def add_to_recordable_attributes(
        self, name: str | None = None, list_of_names: Iterable[str] = (), is_stat: bool = False
    ) -> None:
        """Gives the component these attributes, 0 where it has none yet, as in PML.

        Args:
            is_stat: they are statistics: only where these are collected, and 0 again with each `reset_stats`.
        """
        names = [*([] if name is None else [name]), *(list_of_names or ())]
        if is_stat and not self.collect_stats:
            return
        if is_stat:
            known = self.__dict__.get("_named", ())
            self._named = (*known, *(each for each in names if each not in known))
        for each in names:
            if not hasattr(self, each):
                setattr(self, each, 0)

    def reset_stats(self) -> None:
        """Sets to 0 what is always counted, and the statistics too if they are collected."""
        for each in _statistics(self):
            if each.always or self.collect_stats:
                setattr(self, each.name, 0)


class Statistics:
    """The statistics of a component and of all within it, by the way to each: "distance.final_avg_query_norm"."""

    def __init__(self, component: nn.Module) -> None:
        self._places = {
            ".".join(filter(None, (path, each.name))): (module, each.name, each.counts)
            for path, module in component.named_modules()
            if isinstance(module, Recorder)
            for each in _statistics(module)
        }

    def read(self) -> dict[str, float]:
        """Those that are collected."""
        values = {way: _number(getattr(module, name)) for way, (module, name, _) in self._places.items()}
        return {way: value for way, value in values.items() if value is not None}

    def write(self, values: Mapping[str, float]) -> None:
        """Sets those that there are."""
        for way, value in values.items():
            if way in self._places:
                module, name, counts = self._places[way]
                setattr(module, name, int(value) if counts and value.is_integer() else value)


class _Statistic(NamedTuple):
    name: str
    always: bool = False  # written, asked for or not
    counts: bool = False  # is a number of things, not of any size


def _statistics(recorder: Recorder) -> Iterator[_Statistic]:
    """Those of its class, which are fields, and those that its constructor named. False is 0 to Python, and is none."""
    for each in dataclasses.fields(recorder):
        if not each.init and each.default in (None, 0) and each.default is not False:
            yield _Statistic(each.name, each.default == 0, "float" not in str(each.type))
    for name in recorder.__dict__.get("_named", ()):
        yield _Statistic(name, counts=True)  # for all that is known


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor | np.generic) and value.ndim == 0:
        value = value.item()
    return value if isinstance(value, int | float) else None
