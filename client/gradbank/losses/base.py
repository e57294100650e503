"""What every loss shares: the call, its checks, the regularizer, and the loss of pairs."""

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gradbank.checks import check_batch
from gradbank.component import Component, foundation
from gradbank.distances import Distance, LpDistance
from gradbank.engine import (
    Anchors,
    Indices,
    LabelledPairs,
    ListedPairs,
    Pairs,
    References,
    Statistic,
    as_pairs,
    evaluate,
    full_precision,
    widened,
)
from gradbank.reducers import MeanReducer, Ratio, Reducer
from gradbank.regularizers import Regularizer


class Staged(NamedTuple):
    """A loss that was computed, and what is left to do for the call to have happened.

    `commit` puts references and integers in place and nothing else: until it is called, whatever the loss
    remembers is as it was.
    """

    loss: Tensor
    commit: Callable[[], None]


@foundation
class Loss(Component):
    """A loss that is called as `loss_fn(embeddings, labels, ...)` and backpropagates to the embeddings.

    Args:
        embedding_regularizer: a cost of the embeddings themselves, added to the loss.
        embedding_reg_weight: what that cost is multiplied by.
    """

    embedding_regularizer: Regularizer | None = field(default=None, kw_only=True)
    embedding_reg_weight: float = field(default=1.0, kw_only=True)

    def stage(self, *args: Any, **kwargs: Any) -> Staged:
        """The call, without its effects; a loss that remembers something overrides this one."""
        return Staged(self(*args, **kwargs), lambda: None)

    def regularized(self, loss: Tensor, embeddings: Tensor) -> Tensor:
        """`loss` with the cost of the `(B, D)` embeddings added, if the loss has a regularizer."""
        if self.embedding_regularizer is None:
            return loss
        cost: Tensor = self.embedding_regularizer(embeddings)
        return loss + cost * self.embedding_reg_weight


@foundation
class PairLoss(Loss):
    """A loss that compares anchors with references: the batch itself, `ref_emb`, or a queue.

    A subclass declares which statistics of an anchor's negatives it needs, and writes its terms on those and
    on the positives; the engines do the rest, in bounded memory, for any number of references.

    Args:
        distance: how far apart embeddings are.
        reducer: how the losses of pairs, triplets or anchors become one number.
    """

    distance: Distance = field(default_factory=LpDistance, kw_only=True)
    reducer: Reducer = field(default_factory=MeanReducer, kw_only=True)

    counts_repeats: ClassVar[bool] = True
    """Whether a pair that `indices_tuple` names twice counts twice, as in PML's pair-based losses."""

    learns_references: ClassVar[bool] = False
    """Whether the batch is compared with parameters of the loss, rather than with what the caller chooses."""

    def negatives(self) -> Mapping[str, Statistic]:
        """The statistics of each anchor's negatives that `terms` uses, by name."""
        raise NotImplementedError(f"{type(self).__name__} must define negatives")

    def terms(self, anchors: Anchors) -> Mapping[str, Ratio]:
        """The named parts of the loss of a block of anchors, reduced."""
        raise NotImplementedError(f"{type(self).__name__} must define terms")

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Indices | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            embeddings: `(B, D)` floats.
            labels: `(B,)`; may be left out where `indices_tuple` is given.
            indices_tuple: `(a, p, n)` or `(a1, p, a2, n)`, int64, in place of all pairs that the labels make.
            ref_emb: `(M, D)` references; without them the batch is compared with itself.
            ref_labels: `(M,)`. Without them, or if they are the very object `labels`, reference i is anchor i,
                and no anchor is its own positive.

        Raises:
            ValueError: a shape that does not fit, or neither labels nor indices.
        """
        check_batch(embeddings, labels)
        embeddings, ref_emb = widened(embeddings), None if ref_emb is None else widened(ref_emb)
        if ref_emb is not None:
            self.distance.check_shapes(embeddings, ref_emb)
        elif ref_labels is not None and ref_labels is not labels:
            raise ValueError("ref_labels are the labels of ref_emb: pass both, or neither")
        if labels is None and indices_tuple is None:
            raise ValueError(f"{type(self).__name__} needs labels, or an indices_tuple")
        is_self = ref_labels is None or ref_labels is labels
        references = References((embeddings if ref_emb is None else ref_emb,), labels if is_self else ref_labels)
        labels = None if labels is None else labels.to(embeddings.device)
        if references.labels is not None:
            references = References(references.pieces, references.labels.to(embeddings.device))
            if references.labels.shape != (len(references),):  # type: ignore[union-attr]
                raise ValueError(
                    f"ref_labels must be ({len(references)},), one per row of ref_emb, got "
                    f"{tuple(references.labels.shape)}"  # type: ignore[union-attr]
                )
        if indices_tuple is not None:
            return self.compare_listed(embeddings, references, indices_tuple)
        assert labels is not None
        assert references.labels is not None
        own = torch.arange(len(embeddings), device=embeddings.device) if is_self else None
        return self.compare(embeddings, references, LabelledPairs(labels, references.labels, own))

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Tensor:
        """The loss of `(B, D)` embeddings over the given pairs with references."""
        if not self.learns_references and next(self.parameters(), None) is not None:
            raise ValueError(
                f"{type(self).__name__} has parameters, which would get no gradient: a loss of pairs learns its "
                "references (as ArcFaceLoss does), and nothing else so far"
            )
        with full_precision(embeddings.device):
            return self.regularized(evaluate(self, embeddings, references, pairs), embeddings)

    def compare_listed(self, embeddings: Tensor, references: References, indices: Indices) -> Tensor:
        """The loss over pairs, or triplets, that were named one by one."""
        listed = as_pairs(indices, embeddings.device)
        once = not self.counts_repeats
        return self.compare(embeddings, references, ListedPairs(listed, (len(embeddings), len(references)), once))


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))` without torch's cut-off at 20, which is wrong in the tenth digit."""
    return torch.logaddexp(x, torch.zeros_like(x))
