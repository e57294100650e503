"""Losses that classify embeddings with a learned weight per class."""

import math
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradbank.checks import check_batch
from gradbank.component import component, foundation
from gradbank.distances import CosineSimilarity, Distance
from gradbank.engine import (
    Anchors,
    Indices,
    LabelledPairs,
    LogSumExp,
    References,
    Statistic,
    as_pairs,
    check_indices,
    full_precision,
    widened,
)
from gradbank.losses.base import PairLoss, softplus
from gradbank.reducers import Ratio
from gradbank.regularizers import Regularizer


@foundation
class ClassificationLoss(PairLoss):
    """A softmax over classes: each embedding is compared with a weight vector per class.

    An embedding's positive is the weight of its class, its negatives those of all others, so this is a loss of
    pairs whose references are learned.

    Args:
        num_classes: C; labels must be in `0 .. C - 1`.
        embedding_size: D.
        weight_regularizer: a cost of the class weights, added to the loss.
        weight_reg_weight: what that cost is multiplied by.
        weight_init_func: called with the `(D, C)` parameter to initialise it; None is `nn.init.normal_`.

    Attributes:
        W: the `(D, C)` class weights, a parameter.
    """

    num_classes: int
    embedding_size: int
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)
    weight_regularizer: Regularizer | None = field(default=None, kw_only=True)
    weight_reg_weight: float = field(default=1.0, kw_only=True)
    # a function cannot be sent, and need not be: a server gets the weights that it made
    weight_init_func: Callable[[Tensor], object] | None = field(default=None, kw_only=True, metadata={"wire": False})

    learns_references: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("num_classes", "embedding_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.W = nn.Parameter(torch.empty(self.embedding_size, self.num_classes))
        (self.weight_init_func or nn.init.normal_)(self.W)

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
            labels: `(B,)` classes in `0 .. C - 1`.
            indices_tuple: a miner's choice; each embedding's loss is multiplied by how often it was named, over
                the most that any was.

        Raises:
            ValueError: a shape or a class that does not fit, no labels, or references.
        """
        name = type(self).__name__
        if labels is None:
            raise ValueError(f"{name} needs labels")
        if (ref_emb is not None and ref_emb is not embeddings) or (ref_labels is not None and ref_labels is not labels):
            raise ValueError(f"{name} compares with its class weights: it takes no ref_emb or ref_labels")
        check_batch(embeddings, labels)
        embeddings = widened(embeddings)
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings have dimension {embeddings.shape[1]}, but {name} was built with "
                f"embedding_size={self.embedding_size}"
            )
        if labels.is_floating_point():
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        labels = labels.to(embeddings.device)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels must be in 0..{self.num_classes - 1} (num_classes={self.num_classes}), got "
                f"{int(labels.min())}..{int(labels.max())}"
            )
        classes = torch.arange(self.num_classes, device=labels.device)
        weight = None if indices_tuple is None else named_weight(indices_tuple, embeddings)
        pairs = LabelledPairs(labels, classes, anchor_weight=weight)
        loss = self.compare(embeddings, References((self.W.T,), classes), pairs)
        if self.weight_regularizer is None:
            return loss
        with full_precision(embeddings.device):
            cost: Tensor = self.weight_regularizer(self.W.T)
            return loss + cost * self.weight_reg_weight

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """`(B, C)` logits of `(B, D)` embeddings, without any margin: their argmax is the predicted class."""
        raise NotImplementedError(f"{type(self).__name__} must define get_logits")


@component
class ArcFaceLoss(ClassificationLoss):
    """Softmax over classes, with a margin added to the angle to the embedding's own class.

        loss[a] = softplus(log sum_{c != y_a} exp(scale * cos(t_c)) - scale * cos(t_y + margin))

    where `t_c` is the angle between embedding and class weight. Beyond `pi - margin` the cosine would turn back:
    there `cos(t_y) - margin * sin(margin)` takes its place.

    Args:
        margin: in degrees.
        scale: the inverse temperature.

    Raises:
        ValueError: a distance other than `CosineSimilarity`.

    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019.
    """

    margin: float = 28.6
    scale: float = 64.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.distance, CosineSimilarity):
            raise ValueError(f"ArcFaceLoss works on angles: distance must be CosineSimilarity, got {self.distance}")

    def negatives(self) -> Mapping[str, Statistic]:
        return {"near": LogSumExp(lambda s: s * self.scale)}

    def terms(self, anchors: Anchors) -> Mapping[str, Ratio]:
        logit = self.scale * self._with_margin(anchors.positives.s)
        losses = softplus(anchors.each(anchors.found["near"].value) - logit)
        if anchors.weight is not None:
            losses = losses * anchors.each(anchors.weight)
        return {"loss": self.reducer(losses)}

    def _with_margin(self, cosine: Tensor) -> Tensor:
        margin = math.radians(self.margin)
        # at 1 the arc cosine's derivative is infinite; a hair below, clamp makes it 0
        most = 1 - torch.finfo(cosine.dtype).eps
        angle = cosine.clamp(-most, most).acos()
        beyond = cosine - margin * math.sin(margin)
        return torch.where(angle <= math.pi - margin, (angle + margin).cos(), beyond)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        with full_precision(embeddings.device):
            embeddings = widened(embeddings)
            logits: Tensor = self.distance(embeddings, self.W.T.to(embeddings.dtype))
            return logits * self.scale


def named_weight(indices: Indices, embeddings: Tensor) -> Tensor | None:
    """How often `indices` names each of the `B` embeddings, over the most that any is named; None if none is."""
    four = as_pairs(indices, embeddings.device)
    named = torch.cat(four if len(indices) == 4 else (four[0], four[1], four[3]))
    check_indices("embedding", named, len(embeddings))
    if not len(named):
        return None
    times = torch.bincount(named, minlength=len(embeddings)).to(embeddings.dtype)
    return times / times.max()
