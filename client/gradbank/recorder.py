"""Components that write down statistics of their last call."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any

from torch import nn

from gradbank.component import Component, foundation


@foundation
class Recorder(Component):
    """A component with statistics: its fields that no argument sets and that are 0 or None by default.

    Those that are None are only written if they are asked for, and are 0 from then until the first call.

    Args:
        collect_stats: whether a call also writes the statistics that the class names; None is no.
    """

    collect_stats: bool | None = field(default=None, kw_only=True)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "collect_stats" and value:
            self.reset_stats()

    def reset_stats(self) -> None:
        """Sets to 0 what is always counted, and the statistics too if they are collected."""
        for each in _statistics(self):
            if each.default == 0 or self.collect_stats:
                setattr(self, each.name, 0)


class Statistics:
    """The statistics of a component and of all within it, by the way to each: "distance.final_avg_query_norm"."""

    def __init__(self, component: nn.Module) -> None:
        self._places = {
            ".".join(filter(None, (path, each.name))): (module, each.name, "float" not in str(each.type))
            for path, module in component.named_modules()
            if isinstance(module, Recorder)
            for each in _statistics(module)
        }

    def read(self) -> dict[str, float]:
        """Those that are collected."""
        values = {way: getattr(module, name) for way, (module, name, _) in self._places.items()}
        return {way: value for way, value in values.items() if isinstance(value, int | float)}

    def write(self, values: Mapping[str, float]) -> None:
        """Sets those that there are."""
        for way, value in values.items():
            if way in self._places:
                module, name, counts = self._places[way]
                setattr(module, name, int(value) if counts and value.is_integer() else value)


def _statistics(recorder: Recorder) -> Iterator[dataclasses.Field[Any]]:
    """The fields that are statistics."""
    return (each for each in dataclasses.fields(recorder) if not each.init and each.default in (None, 0))
