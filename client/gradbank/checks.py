"""What a batch must be before anything is computed from it."""

import math
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from gradbank.errors import NonFiniteError

MOST_BINS = 10_000  # of a histogram, of which each anchor has one


def check_counts(component: object, *names: str, most: int | None = None) -> None:
    """Refuses arguments of a component that are no whole numbers, less than 1, or more than `most`.

    Raises:
        ValueError: the message names the first.
    """
    for name in names:
        value = getattr(component, name)
        if not isinstance(value, Integral) or int(value) < 1 or (most is not None and int(value) > most):
            range_of = ", at least 1" if most is None else f" from 1 to {most:,}"
            raise ValueError(f"{name} must be a whole number{range_of}, got {value!r}")


def require_positive(**values: float) -> None:
    """Refuses, by ValueError, a number that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")


def check_batch(
    embeddings: Tensor,
    labels: Tensor | None,
    name: str = "embeddings",
    labels_name: str = "labels",
    any_shape: bool = False,
) -> None:
    """Refuses a batch whose shapes do not fit.

    Args:
        any_shape: whether an embedding may be of another shape than `(D,)`.

    Raises:
        TypeError: what is no tensor.
        ValueError: embeddings that are not `(B, D)` floats, labels that are not `(B,)` numbers, or what is not dense.
    """
    for each, called in ((embeddings, name), (labels, labels_name)):
        if each is None and called == name:
            raise TypeError(f"{called} must be a tensor, got None")
        if each is not None and not isinstance(each, Tensor):
            way = f"torch.as_tensor({called}) makes it one"
            first: object = each
            while isinstance(first, list | tuple | np.ndarray) and len(first):
                first = first[0]
            if isinstance(first, str):
                way = "number the classes, once for all data: {name: i for i, name in enumerate(sorted(classes))}"
            raise TypeError(f"{called} must be a tensor, got {type(each).__name__}: {way}")
        if each is not None and (each.layout != torch.strided or each.is_nested):
            raise ValueError(f"{called} must be dense, got layout {each.layout}: make it dense with to_dense()")
        if each is not None and each.is_meta:
            raise ValueError(f"{called} must have entries, but is on the device meta")
    if not any_shape and (embeddings.ndim != 2 or not embeddings.shape[1]):
        raise ValueError(f"{name} must be (batch, dimension), got shape {tuple(embeddings.shape)}")
    if not embeddings.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {embeddings.dtype}; call .float() first")
    if labels is not None and labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{labels_name} must be ({len(embeddings)},), one per row of {name}, got shape {tuple(labels.shape)}"
        )
    if labels is not None and labels.is_complex():
        raise ValueError(f"{labels_name} must be integers or floats, got {labels.dtype}")


def as_labels(labels: Tensor, device: torch.device) -> Tensor:
    """Labels on a device, as int64 unless they are floats: a narrow integer would be a mask where it indexes."""
    return labels.to(device) if labels.is_floating_point() else labels.to(device, torch.int64)


def check_finite(embeddings: Tensor, what: str = "embeddings") -> None:
    """Refuses NaN and infinity.

    Raises:
        NonFiniteError: the message names the first row that has one, and how many have.
    """
    if math.isfinite(embeddings.detach().sum()):  # so is all of it: what is not finite does not add up to what is
        return
    bad = ~embeddings.detach().isfinite().all(dim=1)
    if bool(bad.any()):
        rows = bad.nonzero().squeeze(1)
        raise NonFiniteError(
            f"{what}: row {int(rows[0])} is not finite ({len(rows)} of {len(embeddings)} rows hold NaN or infinity); "
            "nothing was changed. Look for an overflow in half precision, or a learning rate that is too high"
        )
