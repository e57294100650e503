"""Components that write down statistics of their last call."""

import dataclasses
from dataclasses import field
from typing import Any

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
        for each in dataclasses.fields(self):
            if not each.init and (each.default == 0 or (each.default is None and self.collect_stats)):
                setattr(self, each.name, 0)
