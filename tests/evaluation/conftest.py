"""Data that the tests of evaluation share."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """600 images of handwritten digits as 64 numbers each, and which digit they show."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:600], dtype=torch.float32), torch.tensor(labels[:600])
