"""A loss of two views that needs no negatives."""

from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradbank.component import component
from gradbank.distances import Distance
from gradbank.engine.eager import eager
from gradbank.losses.base import BaseMetricLossFunction
from gradbank.reducers.kept import LossDict, part_of_all, part_of_each
from gradbank.regularizers import Regularizer

TILE = 2**22
"""How many entries of a covariance matrix are held at a time."""


@component
class VICRegLoss(BaseMetricLossFunction):
    """Makes two views of a sample agree, while every dimension keeps its variance and tells something of its own.

        invariance_loss[i] = invariance_lambda * mean_k (x_ik - y_ik)^2
        variance_loss1[k]  = variance_mu * relu(1 - sqrt(var(x_k) + eps)) / 2
        variance_loss2[k]  = variance_mu * relu(1 - sqrt(var(y_k) + eps)) / 2
        covariance_loss    = covariance_v * sum_{k != l} (cov(x)_kl^2 + cov(y)_kl^2) / D

    It is called `loss_fn(embeddings, ref_emb=ref_emb)`, row i of both being views of the same sample. The covariances
    are computed a tile at a time, and where `2 B <= D` from `(B, B)` products in place of `(D, D)` ones.

    Args:
        distance, embedding_regularizer: refused; here for the message only.

    Raises:
        ValueError: a distance or an embedding regularizer; when it is called, labels, an indices_tuple, fewer than
            two embeddings, or views of different shapes.

    Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022.
    """

    invariance_lambda: float = 25
    variance_mu: float = 25
    covariance_v: float = 1
    eps: float = 1e-4
    distance: Distance | None = field(default=None, kw_only=True)  # type: ignore[assignment]
    embedding_regularizer: Regularizer | None = field(default=None, kw_only=True)

    takes_references: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("distance", "embedding_regularizer"):
            if getattr(self, name) is not None:
                raise ValueError(f"VICRegLoss compares nothing by distance or length: leave {name} out")

    def get_default_distance(self) -> None:
        """None: there is none to compute."""

    def _sub_loss_names(self) -> list[str]:
        return ["invariance_loss", "variance_loss1", "variance_loss2", "covariance_loss"]

    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Tensor, ref_labels: Any
    ) -> LossDict:
        for name, given in (("labels", labels), ("ref_labels", ref_labels), ("indices_tuple", indices_tuple)):
            if given is not None:
                raise ValueError(f"VICRegLoss compares row i with row i: it takes no {name}")
        if ref_emb.shape != embeddings.shape:
            raise ValueError(
                f"VICRegLoss compares row i with row i: ref_emb must be {tuple(embeddings.shape)} as embeddings are, "
                f"got {tuple(ref_emb.shape)}"
            )
        if len(embeddings) < 2:
            raise ValueError(f"VICRegLoss needs at least 2 embeddings to have a variance, got {len(embeddings)}")
        invariance = self.invariance_lambda * (embeddings - ref_emb).square().mean(1)
        covariance = off_diagonal_energy(embeddings) + off_diagonal_energy(ref_emb)
        return {
            "invariance_loss": part_of_each(invariance),
            "variance_loss1": part_of_each(self.variance_mu * self._narrowness(embeddings)),
            "variance_loss2": part_of_each(self.variance_mu * self._narrowness(ref_emb)),
            "covariance_loss": part_of_all(self.covariance_v * covariance / embeddings.shape[1]),
        }

    def _narrowness(self, rows: Tensor) -> Tensor:
        return torch.relu(1 - (rows.var(dim=0) + self.eps).sqrt()) / 2


def off_diagonal_energy(rows: Tensor) -> Tensor:
    """`sum_{k != l} cov_kl^2` of `(B, D)` rows, differentiable once."""
    centred = rows - rows.mean(dim=0)
    return eager(_energy, (centred,)) / (len(rows) - 1) ** 2


def _energy(inputs: tuple[Tensor, ...], needed: tuple[bool, ...]) -> tuple[Tensor, list[Tensor | None]]:
    """`sum_{k != l} (X^T X)_kl^2` and its gradient, `4 X (X^T X - diagonal)`, tile by tile."""
    x = inputs[0].detach()
    # X X^T has the same squares in all. From half as many rows as dimensions on, those off the diagonal are at least
    # as large as those on it, so that the difference keeps its digits
    narrow = 2 * x.shape[0] <= x.shape[1]
    items = x if narrow else x.T.contiguous()
    energy = x.new_zeros((), dtype=torch.float64)
    gradient = torch.empty_like(items) if needed[0] else None
    step = max(1, TILE // len(items))
    for start in range(0, len(items), step):
        gram = items[start : start + step] @ items.T
        if not narrow:
            gram.diagonal(start).zero_()
        energy += gram.square().sum(dtype=torch.float64)
        if gradient is not None:
            torch.mm(gram, items, out=gradient[start : start + step])
    if narrow:
        squares = x.square().sum(0)
        energy -= squares.double().square().sum()
        if gradient is not None:
            gradient -= x * squares
    value = energy.to(x.dtype)
    if gradient is None:
        return value, []
    return value, [(gradient if narrow else gradient.T).mul_(4)]
