"""What losses share that compare embeddings with learned weights of classes."""

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradbank.checks import check_batch, check_counts
from gradbank.component import foundation
from gradbank.distances import Distance
from gradbank.engine import (
    Anchors,
    Indices,
    LabelledPairs,
    LogSumExp,
    Part,
    References,
    Statistic,
    evaluate,
    full_precision,
    named_weight,
    widened,
)
from gradbank.learned import learned_at_once
from gradbank.losses.pair import PairLoss, softplus
from gradbank.regularizers import Regularizer


@foundation
class ClassificationLoss(PairLoss):
    """Compares each embedding with the learned weights of every class.

    An embedding's positive is its own class, its negatives are all others, so this is a loss of pairs whose
    references are learned. It is a softmax over the classes, unless a subclass declares something else:

        loss[a] = softplus(log sum_{c != y_a} exp(z[a, c]) - z'[a, y_a])

    of logits z, and z' with a margin.

    An `indices_tuple` says how much each embedding's loss counts: how often it was named, over the most that any was.

    Args:
        num_classes: C; labels must be in `0 .. C - 1`.
        embedding_size: D.
        weight_regularizer: a cost of the class weights, added to the loss.
        weight_reg_weight: what that cost is multiplied by.
        weight_init_func: called with the parameter to initialise it.
    """

    num_classes: int
    embedding_size: int
    weight_regularizer: Regularizer | None = field(default=None, kw_only=True)
    weight_reg_weight: float = field(default=1.0, kw_only=True)
    # a function cannot be sent, and need not be: a server gets the weights that it made
    weight_init_func: Callable[[Tensor], object] | None = field(default=None, kw_only=True, metadata={"wire": False})

    takes_references: ClassVar[bool] = False
    learns_references: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    use_of_indices: ClassVar = "weights"
    counts_anchors_only: ClassVar[bool] = False
    """Whether an embedding that `indices_tuple` names as a positive or a negative is not counted for it."""

    def __post_init__(self) -> None:
        check_counts(self, "num_classes", "embedding_size")
        self.make_weights()

    def make_weights(self) -> None:
        """Makes the parameter."""
        self.W = self.initialised(self.embedding_size, self.num_classes)

    def initialised(self, *shape: int) -> nn.Parameter:
        """A new parameter of this shape, as `weight_init_func` makes it."""
        weights = nn.Parameter(torch.empty(shape))
        (self.weight_init_func or nn.init.normal_)(weights)
        return weights

    def vectors(self) -> Tensor:
        """The weights as rows, as a regularizer takes them; read at each call, for the parameter may be replaced."""
        return self.W.T

    def classes(self) -> Tensor:
        """The weights by class: `(C, D)`, or `(C, D, K)` for K centers each."""
        return self.vectors()

    def logits(self) -> Distance:
        """What makes logits of embeddings, as `queries` gives them, and of `classes`."""
        raise NotImplementedError(f"{type(self).__name__} must define logits")

    def queries(self, embeddings: Tensor) -> Tensor:
        """The `(B, D)` embeddings as they are compared."""
        return self.distance.prepare(embeddings)

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
            indices_tuple: a miner's choice, as weights.

        Raises:
            ValueError: a shape or a class that does not fit, no labels, or references.
        """
        labels = self._checked(embeddings, labels, ref_emb, ref_labels)
        embeddings = widened(embeddings)
        weight = None
        if indices_tuple is not None:
            weight = named_weight(indices_tuple, embeddings, self.counts_anchors_only)

        def whole(inputs: tuple[Tensor, ...]) -> Any:
            loss = self.classify(inputs[0], labels, weight)
            loss = self.with_cost(loss, "weight", self.weight_regularizer, self.vectors(), self.weight_reg_weight)
            return self.regularized(loss, inputs[0])

        with full_precision(embeddings.device):
            if self.reducer.needs_list:
                value = whole((embeddings,))
            else:
                value = learned_at_once(self, whole, (embeddings,), owned=True)
            self.record(embeddings, labels)
        return value  # type: ignore[no-any-return]

    def record(self, embeddings: Tensor, labels: Tensor) -> None:
        """Writes the statistics of a call, if any are collected."""
        if self.distance.collect_stats:
            self.distance.record(embeddings, (self.vectors(),))

    def classify(self, embeddings: Tensor, labels: Tensor, weight: Tensor | None) -> Any:
        """The loss without its regularizers, of embeddings that count as `(B,)` weights say, or alike."""
        weights = self.classes().to(embeddings.device)
        known = torch.arange(self.num_classes, device=labels.device)
        pairs = LabelledPairs(labels, known, anchor_weight=weight)
        declared = Declared(self, self.logits())
        return evaluate(declared, self.queries(embeddings), References((weights,), known), pairs, self.learned())

    def learned(self) -> list[nn.Parameter]:
        # what a subclass has beside the weights: these are the references, and get their gradient as such
        return [each for name, each in self.named_parameters() if each.requires_grad and name not in _WEIGHTS]

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"others": LogSumExp(lambda z: z)}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        losses = softplus(anchors.each(anchors.found["others"].value) - self.with_margin(anchors.s, anchors))
        return {"loss": anchors.per_anchor(anchors.sum(losses))}

    def with_margin(self, z: Tensor, anchors: Anchors) -> Tensor:
        """The logits of the embeddings' own classes, `(B,)` in the order of `anchors.positives`, with a margin."""
        return z

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """`(B, C)` logits of `(B, D)` embeddings, without any margin: their argmax is the predicted class."""
        self._check_rows(embeddings)
        with full_precision(embeddings.device):
            embeddings = widened(embeddings)
            return self.logits().matrix(self.queries(embeddings), self.classes().to(embeddings))

    def _check_rows(self, embeddings: Tensor, labels: Tensor | None = None) -> None:
        check_batch(embeddings, labels)
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings have dimension {embeddings.shape[1]}, but {type(self).__name__} was built with "
                f"embedding_size={self.embedding_size}"
            )

    def _checked(
        self, embeddings: Tensor, labels: Tensor | None, ref_emb: Tensor | None, ref_labels: Tensor | None
    ) -> Tensor:
        name = type(self).__name__
        if labels is None:
            raise ValueError(f"{name} needs labels")
        if (ref_emb is not None and ref_emb is not embeddings) or (ref_labels is not None and ref_labels is not labels):
            raise ValueError(f"{name} compares with its class weights: it takes no ref_emb or ref_labels")
        self._check_rows(embeddings, labels)
        if labels.is_floating_point():
            raise ValueError(f"labels must be integers, got {labels.dtype}")
        labels = labels.to(embeddings.device, torch.int64)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels must be in 0..{self.num_classes - 1} (num_classes={self.num_classes}), got "
                f"{int(labels.min())}..{int(labels.max())}"
            )
        return labels


_WEIGHTS = {"W", "proxies", "fc"}


class Declared:
    """A loss as an engine takes it, with another distance than the caller's."""

    joins_anchors = False

    def __init__(self, loss: PairLoss, distance: Distance) -> None:
        self.reducer, self.distance = loss.reducer, distance
        self.negatives, self.terms = loss.negatives, loss.terms
