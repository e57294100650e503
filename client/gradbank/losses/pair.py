"""Losses that say what pairs cost, and leave it to the engines to go through them."""

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gradbank.checks import as_labels, check_batch
from gradbank.component import foundation
from gradbank.engine import (
    Anchors,
    Indices,
    LabelledPairs,
    ListedPairs,
    Pairs,
    Part,
    References,
    Statistic,
    as_pairs,
    as_triplets,
    evaluate,
    evaluate_triplets,
    is_of_triplets,
    named_weight,
    widened,
)
from gradbank.losses.base import BaseMetricLossFunction
from gradbank.overrides import is_ours, refuse_uncalled, uncalled
from gradbank.reducers.kept import part_of_all

_CALLED = ("forward", "compare", "negatives", "terms", "logits", "with_margin", "classify")  # and may call others
_NOT_CALLED = (
    *("compute_loss", "_compute_loss", "pair_based_loss", "mat_based_loss", "triplet_based_loss"),
    *("get_cosine", "get_angles", "get_cos_with_margin", "modify_cosine_of_target_classes", "scale_logits"),
    *("get_target_mask", "init_margin", "cast_types", "nca_computation", "sigmoid", "variance_with_eps"),
    *("pos_calc", "neg_calc", "get_per_pair_loss", "get_pairs", "set_stats", "compute_reg_loss", "initialize_beta"),
    *("compute_density", "compute_loss_with_labels", "compute_loss_without_labels", "update_histogram", "weigh_loss"),
    *("add_embedding_regularization_to_loss_dict", "add_weight_regularization_to_loss_dict"),
    *("embedding_regularization_loss", "weight_regularization_loss"),
)


@foundation
class PairLoss(BaseMetricLossFunction):
    """A loss that compares anchors with references: the batch itself, `ref_emb`, or a queue.

    A subclass declares which statistics of an anchor's negatives it needs, and writes its parts on those and on the
    positives; the engines do the rest, in bounded memory, for any number of references.
    """

    is_declared: ClassVar[bool] = True
    _uncalled: ClassVar[list[str]] = []
    joins_anchors: ClassVar[bool] = False
    """Whether a part is written on several anchors together, rather than on each by itself."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = [name for name in _CALLED if hasattr(cls, name) and not is_ours(cls, name)]
        cls._uncalled = uncalled(cls, _NOT_CALLED) if own == ["forward"] else []
        if not own and not is_ours(cls):
            refuse_uncalled(
                cls,
                _NOT_CALLED,
                "derive it from GenericPairLoss or BaseMetricLossFunction, which call compute_loss, or override what "
                "it is declared by (negatives and terms, or forward as a whole)",
            )

    def compute_loss(self, *given: Any, **named: Any) -> Any:
        """Nothing here: an engine computes what is declared.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"{type(self).__name__} is computed by an engine from what it declares, and has no losses by part: call it "
            "as a whole, or with reducer=DoNothingReducer() for its parts"
        )

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        """The statistics of each anchor's negatives that `terms` uses, by name."""
        return {}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        """The named parts of the loss: what each anchor, pair or triplet costs."""
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
            labels: `(B,)`; may be left out where `indices_tuple` is given, by most losses.
            indices_tuple: `(a, p, n)` or `(a1, p, a2, n)`, int64, in place of all pairs that the labels make.
            ref_emb: `(M, D)` references; without them the batch is compared with itself.
            ref_labels: `(M,)`. Without them, or if they are the very object `labels`, reference i is anchor i,
                and no anchor is its own positive.

        Raises:
            ValueError: a shape that does not fit, an argument that the loss does not take, or neither labels nor
                indices.
        """
        if self._uncalled:  # this is the `super` of a forward of one's own
            kind = type(self)
            lost, kind._uncalled = ", ".join(kind._uncalled), []
            warnings.warn(f"{kind.__name__}.forward has what it overrides ({lost}) called by nobody", stacklevel=2)
        self._check_arguments(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        is_self = ref_labels is None or ref_labels is labels
        among_themselves = ref_emb is None or ref_emb is embeddings
        embeddings = widened(embeddings)
        labels = None if labels is None else as_labels(labels, embeddings.device)
        known = labels if is_self or ref_labels is None else as_labels(ref_labels, embeddings.device)
        rows = embeddings if among_themselves or ref_emb is None else widened(ref_emb)
        if known is not None and len(known) != len(rows):
            raise ValueError(f"ref_labels must be ({len(rows)},), one per row of ref_emb, got {tuple(known.shape)}")
        references = References((rows,), known, among_themselves)
        weight = None
        if indices_tuple is not None and self.use_of_indices == "weights":
            weight = named_weight(indices_tuple, embeddings, not among_themselves)
        elif indices_tuple is not None:
            listed = indices_tuple
            return self.at_once(  # type: ignore[no-any-return]
                lambda rows, others: self.compare_listed(rows, others, listed, labels), embeddings, references
            )
        assert labels is not None
        assert known is not None
        own = torch.arange(len(embeddings), device=embeddings.device)
        leaves_out = among_themselves if self.sees_own else is_self
        pairs = LabelledPairs(labels, known, own if leaves_out else None, anchor_weight=weight)
        return self.at_once(lambda rows, others: self.compare(rows, others, pairs), embeddings, references)  # type: ignore[no-any-return]

    def record_distance(self, embeddings: Tensor, references: References) -> None:
        """Has the distance write its statistics of a call; where the distance of others is taken, there are none."""
        self.distance.record(embeddings, references.pieces)

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
        return evaluate(self, embeddings, references, pairs, self.learned())

    def compare_listed(
        self, embeddings: Tensor, references: References, indices: Indices, labels: Tensor | None
    ) -> Any:
        shape = (len(embeddings), len(references))
        if len(indices) == 3 and self.keeps_triplets(embeddings, references, labels):
            a, p, n = as_triplets(indices, shape, embeddings.device)
            return self.of_triplets(embeddings, references, (a, p, n), labels)
        listed = as_pairs(indices, embeddings.device)
        return self.compare(
            embeddings, references, ListedPairs(listed, shape, once=not self.counts_repeats, labels=labels)
        )

    def keeps_triplets(self, embeddings: Tensor, references: References, labels: Tensor | None) -> bool:
        return is_of_triplets(self, embeddings, references, labels)

    def of_triplets(
        self, embeddings: Tensor, references: References, triplets: tuple[Tensor, Tensor, Tensor], labels: Tensor | None
    ) -> Any:
        """The loss of triplets `(a, p, n)`."""
        return evaluate_triplets(self, embeddings, references, triplets, labels)

    def reduced(self, value: Any, embeddings: Tensor, labels: Tensor | None) -> Any:
        """A loss that is one number already, handed to the reducer."""
        return self.reducer({"loss": part_of_all(value)}, embeddings, labels)

    def _check_arguments(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices: Indices | None,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
    ) -> None:
        name = type(self).__name__
        any_shape = self.distance.takes_any_shape
        check_batch(embeddings, labels, any_shape=any_shape)
        if labels is None and (self.needs_labels or indices is None):
            raise ValueError(f"{name} needs labels" + ("" if self.needs_labels else ", or an indices_tuple"))
        if indices is not None and self.use_of_indices == "refused":
            raise ValueError(f"{name} compares all pairs that the labels make: it takes no indices_tuple")
        given = (ref_emb is not None and ref_emb is not embeddings) or (
            ref_labels is not None and ref_labels is not labels
        )
        if given and not self.takes_references:
            raise ValueError(f"{name} compares the batch with itself: it takes no ref_emb or ref_labels")
        if ref_emb is None and ref_labels is not None and ref_labels is not labels:
            raise ValueError("ref_labels are the labels of ref_emb: pass both, or neither")
        if ref_emb is not None:
            check_batch(ref_emb, ref_labels, "ref_emb", "ref_labels", any_shape)
        if ref_emb is not None or any_shape:
            self.distance.check_shapes(embeddings, ref_emb)


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp(x))`, with torch's cut-off where float64 rounds: at 20, the default, the tenth digit is wrong."""
    return F.softplus(x, threshold=50.0)


def or_zero(logsumexp: Tensor) -> Tensor:
    """A log-sum-exp, with 0 for that of nothing, as PML has it."""
    return torch.where(logsumexp.isneginf(), 0, logsumexp)
