"""What losses of pairs and triplets share: the call, its checks, and how a queue compares."""

from collections.abc import Callable
from dataclasses import field, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from gradbank.arguments import default_getter
from gradbank.checks import as_labels, check_batch
from gradbank.component import foundation
from gradbank.distances import Distance, LpDistance
from gradbank.engine import (
    Indices,
    Pairs,
    References,
    every_pair,
    full_precision,
    widened,
)
from gradbank.learned import learned_at_once
from gradbank.losses.loss import Loss
from gradbank.mismatch import Mismatch
from gradbank.overrides import is_ours
from gradbank.recorder import Recorder
from gradbank.reducers import LossDict, MeanReducer, Reducer
from gradbank.reducers.kept import part_of_all


@foundation
class BaseMetricLossFunction(Loss, Recorder):
    """A loss over pairs or triplets, of a batch with itself, with `ref_emb` or with a queue.

    A loss of your own defines `compute_loss`, as in pytorch-metric-learning, and holds whatever that holds; or it is a
    `PairLoss`, which declares what a pair costs and is computed in bounded memory.

    Args:
        distance: how far apart embeddings are.
        reducer: how the losses of pairs, triplets or anchors become one number.
    """

    distance: Distance = field(default_factory=LpDistance, kw_only=True)
    reducer: Reducer = field(default_factory=MeanReducer, kw_only=True)

    takes_references: ClassVar[bool] = True
    """Whether the batch may be compared with `ref_emb` or a queue, in place of itself."""

    learns_references: ClassVar[bool] = False
    """Whether the batch is compared with parameters of the loss, rather than with what the caller chooses."""

    needs_labels: ClassVar[bool] = False
    """Whether labels are needed even where `indices_tuple` names the pairs."""

    sees_own: ClassVar[bool] = False
    """Whether an anchor's own row in a queue is one of its positives."""

    use_of_indices: ClassVar[Literal["pairs", "weights", "refused"]] = "pairs"
    """What `indices_tuple` says: which pairs count, or how much each anchor's loss does."""

    counts_repeats: ClassVar[bool] = True
    """Whether a pair that `indices_tuple` names twice counts twice, as in PML's pair-based losses."""

    is_declared: ClassVar[bool] = False
    """Whether an engine computes it, rather than `compute_loss`."""

    @property
    def takes_interval(self) -> bool:
        """Whether the loss is of triplets and can be told, by an interval of distances, which of them count."""
        return False

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Indices | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> LossDict:
        """The losses by part, each `{"losses": ..., "indices": ..., "reduction_type": ...}`, for the reducer."""
        raise NotImplementedError(f"{type(self).__name__} must define compute_loss")

    def zero_losses(self) -> LossDict:
        """What `compute_loss` returns where nothing is to be compared."""
        return {name: self.zero_loss() for name in self._sub_loss_names()}

    def zero_loss(self) -> dict[str, Any]:
        """The part of a loss of which nothing is to be compared."""
        return part_of_all(0)

    get_default_distance = default_getter("distance")
    get_default_reducer = default_getter("reducer")

    def set_reducer(self, reducer: Reducer | None) -> None:
        """Has another reducer make one number of the losses; None is the default one."""
        self.reducer = reducer  # type: ignore[assignment]  # None becomes the default

    def _sub_loss_names(self) -> list[str]:
        return ["loss"]

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Indices | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar; `compute_loss` gets what was passed, with the batch in place of references left out.

        Args:
            embeddings: `(B, D)` floats, and labels: `(B,)`.
            ref_emb: `(M, D)` references, and ref_labels: `(M,)`.

        Raises:
            ValueError: a shape that does not fit, or an argument that the loss does not take.
        """
        any_shape = self.distance is not None and self.distance.takes_any_shape
        check_batch(embeddings, labels, any_shape=any_shape)
        if ref_emb is not None:
            check_batch(ref_emb, ref_labels, "ref_emb", "ref_labels", any_shape)
        rows = widened(embeddings)
        here = None if labels is None else as_labels(labels, rows.device)
        others = rows if ref_emb is None or ref_emb is embeddings else ref_emb.to(rows.dtype)
        theirs = here if ref_labels is None or ref_labels is labels else as_labels(ref_labels, rows.device)

        def call(rows: Tensor, references: References) -> Any:
            among_themselves = ref_emb is None or ref_emb is embeddings
            ref_rows = rows if among_themselves else references.whole()
            return self.reducer(self.compute_loss(rows, here, indices_tuple, ref_rows, theirs), rows, here)

        return self.at_once(call, rows, References((others,)))  # type: ignore[no-any-return]

    def at_once(
        self,
        call: Callable[[Tensor, References], Any],
        embeddings: Tensor,
        references: References,
        of: Loss | None = None,
    ) -> Any:
        """What `call(embeddings, references)` gives in full precision, with the cost of the embeddings added.

        Its gradients are computed now, unless it is no number, or that of a loss of one's own: what such a one is made
        of may be anybody's, and get a gradient.

        Args:
            of: what has this loss within it, and may cost and learn something itself.
        """
        outer = self if of is None else of

        def whole(inputs: tuple[Tensor, ...]) -> Any:
            with full_precision(inputs[0].device):
                value = self.regularized(call(inputs[0], replace(references, pieces=inputs[1:])), inputs[0])
                return value if outer is self else outer.regularized(value, inputs[0])

        given = (embeddings, *references.pieces)
        at_once = not self.reducer.needs_list and (self.is_declared or is_ours(type(self)))
        value = learned_at_once(outer, whole, given) if at_once else whole(given)
        self.record_distance(embeddings, references)
        return value

    def record_distance(self, embeddings: Tensor, references: References) -> None:
        """Has the distance write its statistics of a call; a `compute_loss` calls it, which does that."""

    def learned(self) -> list[nn.Parameter]:
        """The parameters that get a gradient of the loss."""
        return [each for each in self.parameters() if each.requires_grad]

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
        """The loss of `(B, D)` embeddings over the given pairs with references, without its regularizer."""
        listed = tuple(every_pair(pairs, len(embeddings), references))
        return self.compare_listed(embeddings, references, listed, pairs.anchor_labels)

    def compare_listed(
        self, embeddings: Tensor, references: References, indices: Indices, labels: Tensor | None
    ) -> Any:
        """The same over pairs, or triplets, that were named one by one: pairs `(a1, p, a2, n)` are joined on equal
        anchors by a loss of triplets, and triplets `(a, p, n)` are pairs to a loss of pairs."""
        rows = references.whole().to(embeddings.dtype)
        rows = rows if rows.requires_grad else rows.clone()  # a queue may change before the backward pass
        return self.reducer(self.compute_loss(embeddings, labels, indices, rows, references.labels), embeddings, labels)

    def keeps_triplets(self, embeddings: Tensor, references: References, labels: Tensor | None) -> bool:
        """Whether triplets that are named are compared as they are, and not as the pairs that they are made of."""
        return True

    def require_distance(self, kind: type[Distance], **settings: Any) -> None:
        """Refuses a distance that the loss's formula does not fit.

        Raises:
            ValueError: one that is not a `kind` with these settings.
        """
        fits = type(self.distance) is kind and all(getattr(self.distance, n) == v for n, v in settings.items())
        if not fits:
            listed = ", ".join(f"{name}={value!r}" for name, value in settings.items())
            raise Mismatch(
                f"{type(self).__name__} needs distance={kind.__name__}({listed}), got {self.distance}: leave it out"
            )
