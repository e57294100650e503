"""The contract of pytorch-metric-learning for a user's own losses of pairs."""

from collections.abc import Callable
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from gradbank.component import foundation
from gradbank.engine import Indices, LabelledPairs, References, as_pairs, every_pair
from gradbank.losses.base import BaseMetricLossFunction
from gradbank.losses.loss import Loss
from gradbank.reducers import LossDict
from gradbank.regularizers import Regularizer

EmbeddingRegularizerMixin = Loss  # every loss takes an embedding_regularizer


@foundation
class WeightRegularizerMixin(Loss):
    """The arguments of a loss that learns a weight per class; name it before `BaseMetricLossFunction`.

    Args:
        weight_regularizer: a cost of the weights, which `add_weight_regularization_to_loss_dict` adds.
        weight_reg_weight: what that cost is multiplied by.
        weight_init_func: called with the weights to initialise them; None is `nn.init.normal_`.
    """

    weight_regularizer: Regularizer | None = field(default=None, kw_only=True)
    weight_reg_weight: float = field(default=1.0, kw_only=True)
    # a function cannot be sent, and need not be: a server gets the weights that it made
    weight_init_func: Any = field(default=None, kw_only=True, metadata={"wire": False})

    def __init__(
        self,
        weight_regularizer: Regularizer | None = None,
        weight_reg_weight: float = 1.0,
        weight_init_func: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)  # the next of the bases, with all that it takes
        self.weight_regularizer, self.weight_reg_weight = weight_regularizer, weight_reg_weight
        self.weight_init_func = weight_init_func

    def get_default_weight_init_func(self) -> Any:
        """What initialises the weights where nothing else is given."""
        return torch.nn.init.normal_

    def add_weight_regularization_to_loss_dict(self, loss_dict: dict[str, Any], weights: Tensor) -> None:
        """Adds the cost of the `(C, D)` weights to the parts that `compute_loss` returns."""
        loss_dict.update(self.with_cost({}, "weight", self.weight_regularizer, weights, self.weight_reg_weight))


@foundation
class GenericPairLoss(BaseMetricLossFunction):
    """A loss of a user's own, of the matrix of distances or of listed pairs; it holds either in memory.

    A subclass defines `_compute_loss`, which returns the losses by part, as `compute_loss` does. It is called with
    `(mat, pos_mask, neg_mask)`, all `(B, M)`, or with `(pos_pair, neg_pair, indices_tuple)`: the distances of the
    positive and of the negative pairs, and the four lists that name those. Or it overrides the one of `mat_based_loss`
    and `pair_based_loss` that is called, with `(mat, indices_tuple)`, which makes that of it.

    Args:
        mat_based_loss: which of the two.
    """

    mat_based_loss: Any = False  # as an argument; the attribute of this name is a method, as in PML

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mat_based_loss" and not callable(value):
            name = "_by_matrix"
        super().__setattr__(name, value)

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "mat_based_loss": self._by_matrix}

    @property
    def loss_method(self) -> Callable[[Tensor, Indices], LossDict]:
        """The one of the two methods that is called."""
        made: Callable[[Tensor, Indices], LossDict] = self.mat_based_loss if self._by_matrix else self.pair_based_loss
        return made

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> LossDict:
        named = pairs_named(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if not len(named[0]) and not len(named[2]):
            return self.zero_losses()
        return self.loss_method(self.distance(embeddings, None if ref_emb is embeddings else ref_emb), named)

    def pair_based_loss(self, mat: Tensor, indices_tuple: Indices) -> LossDict:
        """`_compute_loss` of the distances of the pairs."""
        a1, p, a2, n = indices_tuple
        return self._compute_loss(mat[a1, p], mat[a2, n], indices_tuple)

    def _compute_loss(self, *given: Any) -> LossDict:
        raise NotImplementedError(f"{type(self).__name__} must define _compute_loss")


def _mat_based_loss(self: GenericPairLoss, mat: Tensor, indices_tuple: Indices) -> LossDict:
    """`_compute_loss` of the matrix, and of which of its entries are positive and negative pairs."""
    a1, p, a2, n = indices_tuple
    pos_mask, neg_mask = torch.zeros_like(mat), torch.zeros_like(mat)
    pos_mask[a1, p] = 1
    neg_mask[a2, n] = 1
    return self._compute_loss(mat, pos_mask, neg_mask)


GenericPairLoss.mat_based_loss = _mat_based_loss  # which is the name of an argument, too


def pairs_named(
    embeddings: Tensor,
    labels: Tensor | None,
    indices_tuple: Indices | None,
    ref_emb: Tensor,
    ref_labels: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs `(a1, p, a2, n)` that `indices_tuple` names, or else all those that the labels make.

    Raises:
        ValueError: neither of the two.
    """
    if indices_tuple is not None:
        a1, p, a2, n = as_pairs(indices_tuple, embeddings.device)
        return a1, p, a2, n
    if labels is None or ref_labels is None:
        raise ValueError("pass labels, or an indices_tuple")
    own = torch.arange(len(labels), device=labels.device) if ref_labels is labels else None
    listed = every_pair(LabelledPairs(labels, ref_labels, own), len(embeddings), References((ref_emb,)))
    return listed.a1, listed.p, listed.a2, listed.n
