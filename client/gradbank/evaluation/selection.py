"""Which metrics a calculator computes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from gradbank.suggestion import did_you_mean

PREFIX = "calculate_"


class Selection:
    """The metrics of a class, which are its methods called `calculate_NAME`, less those that are not wanted.

    Raises:
        ValueError: a metric that does not exist.
        TypeError: `include` or `exclude` that is not a tuple, list or set.
    """

    def __init__(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        self.original_function_dict: dict[str, Callable[..., Any]] = {
            name.removeprefix(PREFIX): getattr(self, name) for name in dir(self) if name.startswith(PREFIX)
        }
        self.known_metrics = list(self.original_function_dict)
        self.check_primary_metrics(include, exclude)
        self.original_function_dict = self.get_function_dict(include, exclude)
        self.curr_function_dict = self.get_function_dict()

    def get_function_dict(
        self, include: Sequence[str] = (), exclude: Sequence[str] = ()
    ) -> dict[str, Callable[..., Any]]:
        """The metrics that are in `include` (all, if it is empty) and not in `exclude`."""
        wanted = {name for name in include or self.original_function_dict if name not in exclude}
        return {name: each for name, each in self.original_function_dict.items() if name in wanted}

    def get_curr_metrics(self) -> list[str]:
        """The metrics of the last call."""
        return list(self.curr_function_dict)

    def check_primary_metrics(self, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> None:
        """Refuses, by TypeError or ValueError, anything but a tuple, list or set of metrics that exist."""
        for names in (include, exclude):
            if not isinstance(names, tuple | list | set | frozenset):
                raise TypeError(f"include and exclude must be tuples or lists of metrics, got {type(names).__name__}")
            for name in names:
                if name not in self.known_metrics:
                    raise ValueError(f"no metric is called {name!r}{did_you_mean(name, self.known_metrics)}")

    def _get_accuracy(self, function_dict: dict[str, Callable[..., Any]], **kwargs: Any) -> dict[str, Any]:
        return {name: each(**kwargs) for name, each in function_dict.items()}

    def _uses(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.curr_function_dict]
