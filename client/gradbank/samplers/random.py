"""What the samplers draw from: labels in groups, and random numbers.

They draw from numpy's global generator, in the order in which PML's samplers do, so that after `np.random.seed` both
give the same batches. With a `torch.Generator` they draw from that alone: `torch.default_generator` is the one that
`torch.manual_seed` seeds.
"""

from collections.abc import Sequence
from numbers import Number
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Labels = Tensor | np.ndarray[Any, Any] | Sequence[Any]
Indices = np.ndarray[Any, np.dtype[np.int64]]


class SamplingError(ValueError, AssertionError):
    """Arguments that no batch can be drawn by; PML raises AssertionError for most of them."""


class Random(Protocol):
    """What `np.random` and its generators have in common."""

    def shuffle(self, x: Any) -> None: ...

    def choice(self, a: Any, size: int | None = None, replace: bool = True) -> Any: ...


def source(generator: torch.Generator | None) -> Random:
    """numpy's global generator, or a new one seeded by `generator`."""
    if generator is None:
        return np.random  # a module, with the same functions
    seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
    return np.random.default_rng(int(seed))


def choose(random: Random, items: Any, size: int) -> Indices:
    """`size` of the items, each at most once if there are enough of them."""
    chosen: Indices = random.choice(items, size=size, replace=len(items) < size)
    return chosen


def groups(labels: Labels) -> dict[Any, Indices]:
    """The items of each label, both in the order of their first appearance.

    Raises:
        SamplingError: labels that are not one per item, or none.
    """
    if isinstance(labels, list | tuple) and not all(isinstance(each, Number) for each in labels):
        return _by_equality(labels)  # names, or tuples, which an array would turn into each other
    known = as_array(labels)
    if known.ndim != 1 or len(known) == 0:
        raise SamplingError(f"labels must be (items,), one or more, got shape {known.shape}")
    unique, first, ids = np.unique(known, return_index=True, return_inverse=True)
    items = np.split(np.argsort(ids, kind="stable"), np.bincount(ids).cumsum()[:-1])
    return {unique[i]: items[i] for i in np.argsort(first)}


def _by_equality(labels: Sequence[Any]) -> dict[Any, Indices]:
    items: dict[Any, list[int]] = {}
    for item, label in enumerate(labels):
        each = label.item() if isinstance(label, Tensor | np.ndarray) and label.ndim == 0 else label
        try:
            if isinstance(each, Tensor):  # of several numbers, which would be told by the object
                raise TypeError
            items.setdefault(each, []).append(item)
        except TypeError:
            raise SamplingError(f"labels must be (items,), numbers or names, got {each!r:.80} of item {item}") from None
    return {label: np.asarray(rows, dtype=np.int64) for label, rows in items.items()}


def as_array(labels: Labels) -> "np.ndarray[Any, Any]":
    return labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
