"""What tests of regularizers share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Notes how many entries the largest tensor that an operation made had."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor):
                self.entries = max(self.entries, each.untyped_storage().nbytes() // each.element_size())
        return made


@pytest.fixture
def largest() -> Any:
    @contextmanager
    def watched() -> Iterator[Largest]:
        with Largest() as mode:
            yield mode

    return watched


@pytest.fixture
def rows() -> Any:
    """`rows(n, d)`: random float64 rows."""

    def draw(n: int, d: int = 8, seed: int = 0) -> Tensor:
        return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    return draw
