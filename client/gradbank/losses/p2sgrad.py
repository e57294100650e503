"""A loss of the angles to class weights, squared."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradbank.checks import as_labels, check_batch, check_counts
from gradbank.component import component
from gradbank.losses.base import BaseMetricLossFunction
from gradbank.reducers.kept import LossDict, part_of_all


@component
class P2SGradLoss(BaseMetricLossFunction):
    """Draws the cosine to an embedding's own class to 1 and those to all others to 0.

        loss = mean_{i, c} (cos(x_i, w_c) - [c == y_i])^2
             = (trace(X^T X W W^T) - 2 sum_i cos(x_i, w_{y_i}) + B) / (B C),   x_i of length 1

    The second form takes `(B + C) D^2` steps, the first `B C D`: the cheaper one is used, and the `(B, C)` cosines are
    made only where they are no more than that. Class weights are brought to length 1 at every call, in place, and so
    stay on the sphere while they are trained. An embedding of zeros has cosine 0 with every class (PML's is NaN).

    Args:
        descriptors_dim: D.
        num_classes: C; labels must be in `0 .. C - 1`.

    Attributes:
        weight: the `(D, C)` class weights, a parameter.

    Raises:
        ValueError: a size below 1; when it is called, no labels, a label or a dimension that does not fit, an
            indices_tuple, or references.

    Zhang et al., "P2SGrad: Refined Gradients for Optimizing Deep Face Models", CVPR 2019.
    """

    descriptors_dim: int
    num_classes: int

    takes_references: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_counts(self, "descriptors_dim", "num_classes")
        self.weight = nn.Parameter(_unit_columns(torch.empty(self.descriptors_dim, self.num_classes).uniform_(-1, 1)))

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar, of `(B, D)` embeddings and `(B,)` labels in `0 .. C - 1`.

        Raises:
            ValueError: a shape or a class that does not fit, no labels, indices or references.
        """
        check_batch(embeddings, labels)
        self._check(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        self.weight.data = _unit_columns(self.weight.data.to(embeddings.device))
        return super().forward(embeddings, labels)

    def compute_loss(
        self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any
    ) -> LossDict:
        if not len(embeddings):
            return self.zero_losses()
        weight = self.weight.to(embeddings.dtype)
        unit = F.normalize(embeddings, dim=1)
        batch, dimension, classes = len(unit), self.descriptors_dim, self.num_classes
        if (batch + classes) * dimension < batch * classes:
            own = (unit * weight.T[labels]).sum(1)
            energy = ((unit.T @ unit) * (weight @ weight.T)).sum()
            loss = (energy - 2 * own.sum() + batch) / (batch * classes)
        else:
            cosine = (unit @ weight).clamp(-1, 1)
            hot = torch.ones_like(cosine[:, :1])
            loss = cosine.scatter_add(1, labels.unsqueeze(1), -hot).square().mean()
        return {"loss": part_of_all(loss)}

    def _check(self, embeddings: Tensor, labels: Any, indices_tuple: Any, ref_emb: Any, ref_labels: Any) -> None:
        if labels is None:
            raise ValueError("P2SGradLoss needs labels")
        for name, given, own in (
            ("indices_tuple", indices_tuple, None),
            ("ref_emb", ref_emb, embeddings),
            ("ref_labels", ref_labels, labels),
        ):
            if given is not None and given is not own:
                raise ValueError(f"P2SGradLoss compares with its class weights: it takes no {name}")
        if embeddings.shape[1] != self.descriptors_dim:
            raise ValueError(
                f"embeddings have dimension {embeddings.shape[1]}, but P2SGradLoss was built with "
                f"descriptors_dim={self.descriptors_dim}"
            )
        if labels.is_floating_point():
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        number = as_labels(labels, labels.device)
        if len(number) and not 0 <= int(number.min()) <= int(number.max()) < self.num_classes:
            raise ValueError(
                f"labels must be in 0..{self.num_classes - 1} (num_classes={self.num_classes}), got "
                f"{int(number.min())}..{int(number.max())}"
            )


def _unit_columns(weight: Tensor) -> Tensor:
    # PML's very steps, which leave a column 1e-7 short of 1
    return weight.renorm(2, 1, 1e-5).mul(1e5)
