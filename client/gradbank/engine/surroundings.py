"""What a trainer surrounds a call with that is not meant for the gradients computed within it."""

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Callable[..., Any])


def uncompiled(call: T) -> T:
    """Has a compiler that traces what makes the call leave it alone: its gradients are computed as it is made, which
    a compiler cannot follow, and it has nothing left to fuse."""
    apart: list[Callable[..., Any]] = []

    @functools.wraps(call)
    def called(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # which takes seconds to load, and is only there if anything compiles
            return call(*args, **kwargs)
        if not apart:
            apart.append(torch.compiler.disable(call))  # type: ignore[no-untyped-call]  # torch's
        return apart[0](*args, **kwargs)

    return called  # type: ignore[return-value]


def own_graph() -> AbstractContextManager[Any]:
    """Keeps the hooks of saved tensors from a graph that is differentiated at once: those of
    `torch.utils.checkpoint` would run the trainer's model again for it."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return nullcontext()
    # without its graph: of what an operation saves of its own output, that would lead back to itself
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _as_it_is)


def _as_it_is(saved: Tensor) -> Tensor:
    return saved
