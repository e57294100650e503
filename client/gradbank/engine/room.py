"""How much is held at a time: what a core's cache takes, or enough to keep a GPU busy."""

import torch

_WHOLE, _WHOLE_ON_A_GPU = 2**18, 2**24  # entries: on a GPU, what is told in fewer operations is the quicker by far
_MORE_ON_A_GPU = 16  # measured: with 4 times as much as on a CPU a step takes a fourth longer, with 64 times no less


def room(numbers: int, device: torch.device) -> int:
    """How many numbers may be held at a time on a device, where a CPU does best with so many.

    A GPU takes as long to be told what to do as it needs for a million numbers, and keeps no small tile near.
    """
    return numbers if device.type == "cpu" else _MORE_ON_A_GPU * numbers


def whole(device: torch.device) -> int:
    """How many entries the distance matrix may have, at most, to be held whole."""
    return _WHOLE if device.type == "cpu" else _WHOLE_ON_A_GPU
