"""Losses are computed in float32 or float64, whatever the model around them uses.

Half-precision embeddings are widened first, and autocast, which would narrow the products of wide ones, is kept out.
"""

import torch
from torch import Tensor


def full_precision(device: torch.device) -> torch.autocast:
    """A context without autocast."""
    return torch.autocast(device.type, enabled=False)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
