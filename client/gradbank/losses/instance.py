"""Losses that classify each anchor among as many others."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gradbank.component import component, foundation
from gradbank.distances import CosineSimilarity, Distance, DotProductSimilarity
from gradbank.engine import (
    Anchors,
    Indices,
    LabelledPairs,
    ListedPairs,
    LogSumExp,
    Pairs,
    Part,
    References,
    Statistic,
    as_pairs,
    evaluate,
)
from gradbank.losses.pair import PairLoss, softplus
from gradbank.reducers.kept import LossDict, part_of_each


@foundation
class OwnClassLoss(PairLoss):
    """Cross-entropy of each anchor's one reference against all references."""

    takes_references: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True

    def logit(self, s: Tensor) -> Tensor:
        """Of distances or similarities, what the softmax takes."""
        return self.distance.closeness(s)

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"others": LogSumExp(self.logit)}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        others = anchors.each(anchors.found["others"].value)
        return {"loss": anchors.per_anchor(anchors.sum(softplus(others - self.logit(anchors.s))))}


@component
class InstanceLoss(OwnClassLoss):
    """Cross-entropy of each row's similarities to all rows, itself included, as logits.

        loss[a] = -log(exp(gamma s[a, t]) / sum_b exp(gamma s[a, b])),   t = the rank of the label of a

    with b over all of the batch. The target is, as in PML, the row whose number is the label's rank among the labels
    present: meant for batches in which every label is different and rows are in order of their labels, where it is the
    row itself.

    Raises:
        ValueError: a distance other than `CosineSimilarity`.

    Zheng et al., "Dual-Path Convolutional Image-Text Embeddings with Instance Loss", TOMM 2020.
    """

    gamma: float = 64
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)

    use_of_indices: ClassVar = "refused"

    def __post_init__(self) -> None:
        self.require_distance(CosineSimilarity)

    def logit(self, s: Tensor) -> Tensor:
        return s * self.gamma

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
        labels = pairs.anchor_labels
        assert labels is not None  # needs_labels
        return super().compare(embeddings, references, _own(torch.unique(labels, return_inverse=True)[1], labels))


@component
class NPairsLoss(OwnClassLoss):
    """Cross-entropy of one anchor of each class among one positive of each class.

        loss[i] = -log(exp(s[a_i, p_i]) / sum_j exp(s[a_i, p_j]))

    over one pair `(a_i, p_i)` of each label that at least two rows have: its first two rows, or the first pair of it
    that `indices_tuple` lists. A distance is negated. `NPairLoss` draws the pairs at random and takes rows of length 1.

    Attributes:
        num_pairs: how many pairs the last call compared.

    Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss Objective", NIPS 2016.
    """

    distance: Distance = field(default_factory=DotProductSimilarity, kw_only=True)
    num_pairs: int = field(default=0, init=False)

    def record_distance(self, embeddings: Tensor, references: References) -> None:
        pass  # it compares only the pairs

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
        labels = pairs.anchor_labels
        assert labels is not None  # needs_labels
        order = labels.argsort(stable=True)
        next_of_class = labels[order[1:]] == labels[order[:-1]]
        return self._of_pairs(embeddings, labels, order[:-1][next_of_class], order[1:][next_of_class])

    def compare_listed(
        self, embeddings: Tensor, references: References, indices: Indices, labels: Tensor | None
    ) -> Any:
        assert labels is not None  # needs_labels
        listed = as_pairs(indices, embeddings.device)
        ListedPairs(listed, (len(embeddings), len(embeddings)))  # refuses what does not fit
        return self._of_pairs(embeddings, labels, listed[0], listed[1])

    def _of_pairs(self, embeddings: Tensor, labels: Tensor, a: Tensor, p: Tensor) -> Any:
        order = labels[a].argsort(stable=True)
        ordered = labels[a][order]
        first = order[F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)[: len(ordered)]]
        a, p = a[first], p[first]
        if not len(a):
            value = self.reducer(self.zero_losses(), embeddings, labels)
        elif self.reducer.needs_list:
            value = self.reducer(self._listed(embeddings, a, p), embeddings, labels)
        else:
            pairs = _own(torch.arange(len(a), device=a.device), labels[a])
            # plain indexing goes number by number, there and back
            anchors, positives = embeddings.index_select(0, a), embeddings.index_select(0, p)
            value = evaluate(self, anchors, References((positives,)), pairs)
        self.num_pairs = len(a)
        if self.distance.collect_stats:
            self.distance.record(embeddings[a], (embeddings[p],))
        return value

    def _listed(self, embeddings: Tensor, a: Tensor, p: Tensor) -> LossDict:
        logits = self.logit(self.distance(embeddings.index_select(0, a), embeddings.index_select(0, p)))
        losses = F.cross_entropy(logits, torch.arange(len(a), device=a.device), reduction="none")
        return {"loss": part_of_each(losses, a)}


def _own(target: Tensor, labels: Tensor) -> LabelledPairs:
    """The pairs of anchors whose one positive is the reference of that number."""
    pairs = LabelledPairs(target, torch.arange(len(target), device=target.device))
    pairs.anchor_labels = labels  # what reducers go by
    return pairs
