"""Losses are computed in float32 or float64, whatever the model around them uses.

Half-precision embeddings are widened first, and autocast, which would narrow the products of wide ones, is kept out.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast."""
    on = torch.is_autocast_enabled(device.type)  # else there is nothing to enter, which takes a while
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
