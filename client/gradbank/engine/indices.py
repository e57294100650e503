"""Pairs and triplets that are named one by one, as miners and users hand them over."""

import torch
from torch import Tensor

Indices = tuple[Tensor, ...]  # (a, p, n) triplets, or (a1, p, a2, n) pairs: int64, one-dimensional


def as_pairs(indices: Indices, device: torch.device) -> Indices:
    """An `indices_tuple` of either form as `(a1, p, a2, n)` on `device`: a triplet is a pair of each kind.

    Raises:
        ValueError: neither three nor four tensors, or a tensor that does not hold integers in one dimension.
        TypeError: what is no tensor.
    """
    if len(indices) not in (3, 4):
        raise ValueError(f"indices_tuple must be (a, p, n) or (a1, p, a2, n), got {len(indices)} tensors")
    for index in indices:
        if not isinstance(index, Tensor):
            raise TypeError(
                f"indices_tuple must hold tensors, got {type(index).__name__}: torch.as_tensor makes it one"
            )
        if index.numel() and (index.is_floating_point() or index.dtype == torch.bool):  # torch.tensor([]) is of floats
            raise ValueError(f"indices_tuple must hold integers, got {index.dtype}")
        if index.ndim != 1:
            raise ValueError(f"indices_tuple must hold tensors of one dimension, got shape {tuple(index.shape)}")
    here = tuple(index.to(device, torch.int64) for index in indices)
    return (here[0], here[1], here[0], here[2]) if len(here) == 3 else here


def as_triplets(indices: Indices, shape: tuple[int, int], device: torch.device) -> Indices:
    """`(a, p, n)` on `device`, checked.

    Raises:
        ValueError: lists of different lengths, or an index outside the batch or the references.
    """
    a, p, _, n = as_pairs(indices, device)
    if not len(a) == len(p) == len(n):
        raise ValueError(f"triplets (a, p, n) must be of one length, got {len(a)}, {len(p)} and {len(n)}")
    for kind, index, size in (("anchor", a, shape[0]), ("positive", p, shape[1]), ("negative", n, shape[1])):
        check_indices(kind, index, size)
    return a, p, n


def named_weight(indices: Indices, embeddings: Tensor, anchors_only: bool = False) -> Tensor | None:
    """How often `indices` names each of the `B` embeddings, over the most that any is named; None if none is.

    Args:
        anchors_only: count only as what anchors they are named, since the others are references.
    """
    four = as_pairs(indices, embeddings.device)
    a1, p, a2, n = four
    if anchors_only:
        named = torch.cat((a1, a2) if len(indices) == 4 else (a1,))
    else:
        named = torch.cat(four if len(indices) == 4 else (a1, p, n))
    check_indices("embedding", named, len(embeddings))
    if not len(named):
        return None
    times = torch.bincount(named, minlength=len(embeddings)).to(embeddings.dtype)
    return times / times.max()


def unflattened(flat: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Places in a flattened matrix of so many columns, as rows and columns."""
    row = torch.div(flat, max(width, 1), rounding_mode="floor")
    return row, flat - row * width


def check_indices(kind: str, index: Tensor, size: int) -> None:
    """Refuses an index that is not in `0 .. size - 1`.

    Raises:
        ValueError: the message names the kind and the range.
    """
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
        named = "labels are" if kind == "label" else f"indices_tuple names {kind}s"
        raise ValueError(f"{named} {int(index.min())} to {int(index.max())}, but must stay within 0..{size - 1}")
