"""Reducers: from what each pair, triplet or anchor costs to one number.

Every reducer here first says which losses count (those between its `bounds`) and then makes one number of their sums
and counts per anchor. So an engine can add losses up, anchor by anchor, without ever listing them; a reducer of your
own that wants the list, written as in pytorch-metric-learning, gets it.
"""

from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gradbank.component import Component, component, foundation

Kind = Literal["element", "pos_pair", "neg_pair", "triplet", "already_reduced"]
LossDict = Mapping[str, Mapping[str, Any]]


class Ratio(NamedTuple):
    """One named part of a loss, reduced so far: a numerator and a denominator, so that the parts of a loss that were
    computed apart (blocks of anchors) can be added up."""

    numerator: Tensor  # () float64, differentiable
    denominator: Tensor | None  # () float64, a constant; None where nothing is divided by

    def value(self) -> Tensor:
        """What the part is worth: 0 (which backpropagates zeros) where nothing was left to reduce."""
        if self.denominator is None:
            return self.numerator
        return self.numerator / torch.where(self.denominator > 0, self.denominator, 1.0)

    def plus(self, other: "Ratio") -> "Ratio":
        """The ratio of both parts together."""
        if self.denominator is None or other.denominator is None:
            return Ratio(self.numerator + other.numerator, None)
        return Ratio(self.numerator + other.numerator, self.denominator + other.denominator)


class Kept(NamedTuple):
    """The losses that count, added up by anchor."""

    sums: Tensor  # (b,), differentiable
    counts: Tensor  # (b,), a constant: how many losses each sum is made of
    kind: Kind
    labels: Tensor | None = None  # (b,) the anchors'
    divisor: Tensor | float | None = None  # what the loss itself would divide by


@foundation
class Reducer(Component):
    """A mean over the losses that lie strictly between two bounds.

    A reducer of your own overrides `element_reduction`, `pos_pair_reduction`, `neg_pair_reduction` and
    `triplet_reduction`, each called with `(losses, indices, embeddings, labels)`, or `forward` as a whole. It then
    sees every loss, so every loss is held in memory.
    """

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        """The losses that count lie strictly between these; None is no bound."""
        return None, None

    @property
    def needs_list(self) -> bool:
        """Whether the reducer must see every loss: it has methods that are not the ones below."""
        names = ("forward", "combine", *(f"{kind}_reduction" for kind in _KINDS))
        return any(getattr(type(self), name).__module__ != __name__ for name in names)

    def of(self, part: str) -> "Reducer":
        """The reducer of the part of a loss that has this name."""
        return self

    def weigh(self, losses: Tensor, weight: Tensor | None = None) -> Tensor:
        """`weight` (None is 1), with 0 in place of each loss that does not count."""
        low, high = self.bounds
        above = None if low is None else losses if low == 0 else losses - low
        kept = None
        for margin in (above, None if high is None else high - losses):
            if margin is not None:
                inside = margin.sign().clamp_(min=0)  # not a mask, for masks are slow
                kept = inside if kept is None else kept * inside
        if weight is None:
            return torch.ones_like(losses) if kept is None else kept
        # a loss that was not asked for may be none, and 0 * NaN would be NaN
        return weight if kept is None else torch.where(weight > 0, weight * kept, 0)

    def combine(self, kept: Kept) -> Ratio:
        """One number of the losses that count."""
        return Ratio(kept.sums.sum(dtype=torch.float64), kept.counts.sum(dtype=torch.float64))

    def forward(self, loss_dict: LossDict, embeddings: Tensor, labels: Tensor | None) -> Any:
        """Reduces listed losses to a scalar.

        Args:
            loss_dict: parts by name, each with its `losses` (`(N,)`, or 0), their `indices` (`(N,)` anchors, or a
                pair or triplet of such lists), their `reduction_type` and, if the loss has one, a `divisor`.
            embeddings: `(B, D)`, and labels: `(B,)` or None: what the indices point at.
        """
        parts = [self.of(name)._reduced(part, embeddings, labels) for name, part in loss_dict.items()]
        return torch.stack(parts).sum()

    def _reduced(self, part: Mapping[str, Any], embeddings: Tensor, labels: Tensor | None) -> Tensor:
        losses, kind = part["losses"], part["reduction_type"]
        if not isinstance(losses, Tensor):
            zero: Tensor = (embeddings * 0).sum() + losses
            return zero
        # methods of a user's own take no divisor
        extra = {"divisor": part["divisor"]} if "divisor" in part and not self.needs_list else {}
        made: Tensor = getattr(self, f"{kind}_reduction")(losses, part["indices"], embeddings, labels, **extra)
        return made

    def already_reduced_reduction(self, losses: Tensor, indices: Any, embeddings: Tensor, labels: Any) -> Tensor:
        return losses.reshape(())

    def element_reduction(
        self, losses: Tensor, indices: Any, embeddings: Tensor, labels: Tensor | None, divisor: Any = None
    ) -> Tensor:
        return self._listed("element", losses, indices, embeddings, labels, divisor)

    def pos_pair_reduction(
        self, losses: Tensor, indices: Any, embeddings: Tensor, labels: Tensor | None, divisor: Any = None
    ) -> Tensor:
        return self._listed("pos_pair", losses, indices, embeddings, labels, divisor)

    def neg_pair_reduction(
        self, losses: Tensor, indices: Any, embeddings: Tensor, labels: Tensor | None, divisor: Any = None
    ) -> Tensor:
        return self._listed("neg_pair", losses, indices, embeddings, labels, divisor)

    def triplet_reduction(
        self, losses: Tensor, indices: Any, embeddings: Tensor, labels: Tensor | None, divisor: Any = None
    ) -> Tensor:
        return self._listed("triplet", losses, indices, embeddings, labels, divisor)

    def _listed(
        self, kind: Kind, losses: Tensor, indices: Any, embeddings: Tensor, labels: Tensor | None, divisor: Any
    ) -> Tensor:
        if kind == "element":  # one per anchor already, perhaps not of all anchors, or not of anchors at all
            own = (
                labels[indices] if labels is not None and indices is not None and len(indices) <= len(labels) else None
            )
            kept = add_up(self, kind, losses, None, None, len(losses), own, divisor)
        else:
            kept = add_up(self, kind, losses, None, indices[0], len(embeddings), labels, divisor)
        ratio = self.combine(kept)
        return ratio.value().to(losses.dtype)


_KINDS = ("already_reduced", "element", "pos_pair", "neg_pair", "triplet")


def counted(losses: Tensor, weight: Tensor) -> Tensor:
    """The losses times their weights. A loss that does not count may be infinite, and 0 * inf would be NaN."""
    return torch.where(weight > 0, losses, torch.zeros_like(losses)) * weight


def add_up(
    reducer: Reducer,
    kind: Kind,
    losses: Tensor,
    times: Tensor | None,
    anchor: Tensor | None,
    size: int,
    labels: Tensor | None = None,
    divisor: Tensor | float | None = None,
) -> Kept:
    """The `(N,)` losses that count for `reducer`, added up by anchor.

    Args:
        times: `(N,)` how often each one counts, or None for once.
        anchor: `(N,)` whose loss each one is, in `0 .. size - 1`, or None where the losses are one per anchor.
    """
    weight = reducer.weigh(losses.detach(), times)
    sums, counts = counted(losses, weight).double(), weight.double()
    if anchor is not None:
        sums, counts = (x.new_zeros(size).index_add(0, anchor, x) for x in (sums, counts))
    return Kept(sums, counts, kind, labels, divisor)


@component
class MeanReducer(Reducer):
    """The mean over every loss."""


@component
class SumReducer(Reducer):
    """The sum of every loss."""

    def combine(self, kept: Kept) -> Ratio:
        return Ratio(kept.sums.sum(dtype=torch.float64), None)


@component
class ThresholdReducer(Reducer):
    """The mean over the losses strictly above `low` and strictly below `high`; 0 if there are none.

    Raises:
        ValueError: neither bound was given.
    """

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise ValueError("ThresholdReducer needs at least one of low and high")

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return self.low, self.high


@component
class AvgNonZeroReducer(Reducer):
    """The mean over the losses above 0: `ThresholdReducer(low=0)`."""

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return 0.0, None


@component
class ClassWeightedReducer(Reducer):
    """The mean of the losses, each times the weight of its anchor's class.

        sum_i weights[label of the anchor of i] * loss[i] / number of losses

    Args:
        weights: `(C,)`; labels must be in `0 .. C - 1`.

    Raises:
        ValueError: no labels, or labels outside that range, when it is called.
    """

    weights: Tensor

    def combine(self, kept: Kept) -> Ratio:
        labels = kept.labels
        if labels is None:
            raise ValueError("ClassWeightedReducer weighs losses by their anchor's label: pass labels to the loss")
        if labels.is_floating_point():
            raise ValueError(f"ClassWeightedReducer needs integer labels, got {labels.dtype}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.weights):
            raise ValueError(
                f"ClassWeightedReducer has weights for the labels 0..{len(self.weights) - 1}, got labels "
                f"{int(labels.min())}..{int(labels.max())}"
            )
        weights = self.weights.to(kept.sums)[labels]
        return Ratio((kept.sums * weights).sum(), kept.counts.sum(dtype=torch.float64))


@component
class DivisorReducer(Reducer):
    """The sum of the losses over the divisor that the loss itself gives, as `MarginLoss` and `ProxyAnchorLoss` do.

    Raises:
        ValueError: a loss that gives none, when it is called.
    """

    def combine(self, kept: Kept) -> Ratio:
        if kept.divisor is None:
            raise ValueError("DivisorReducer needs a loss that gives a divisor (MarginLoss or ProxyAnchorLoss do)")
        divisor = torch.as_tensor(kept.divisor, dtype=torch.float64, device=kept.sums.device)
        return Ratio(kept.sums.sum(dtype=torch.float64), divisor)


@component
class PerAnchorReducer(Reducer):
    """First the mean over each anchor's pairs (or triplets), 0 where it has none; then `reducer` over the anchors.

    Args:
        reducer: how the anchors' means become one number; None is `MeanReducer()`.
        aggregation_func: in place of the mean: called with `(B, K)` losses by anchor, zero where an anchor has fewer
            than K, and the number of losses of each; gives `(B,)`. A function cannot be sent to a server.
    """

    reducer: Reducer = field(default_factory=MeanReducer)
    aggregation_func: Any = None

    @property
    def needs_list(self) -> bool:
        return self.aggregation_func is not None or self.reducer.needs_list or super().needs_list

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return None, None

    def combine(self, kept: Kept) -> Ratio:
        some = kept.counts > 0 if kept.kind == "element" else torch.ones_like(kept.counts, dtype=torch.bool)
        means = kept.sums / kept.counts.clamp(min=1)
        return self.reducer.combine(
            add_up(self.reducer, "element", means, some.to(means.dtype), None, len(means), kept.labels, kept.divisor)
        )

    def _reduced(self, part: Mapping[str, Any], embeddings: Tensor, labels: Tensor | None) -> Tensor:
        losses, kind = part["losses"], part["reduction_type"]
        if not self.needs_list or not isinstance(losses, Tensor) or kind == "already_reduced":
            return super()._reduced(part, embeddings, labels)
        if kind != "element":
            losses = self._aggregated(losses, part["indices"][0], len(embeddings))
            part = {"losses": losses, "indices": torch.arange(len(losses), device=losses.device)}
        return self.reducer._reduced({**part, "reduction_type": "element"}, embeddings, labels)

    def _aggregated(self, losses: Tensor, anchor: Tensor, size: int) -> Tensor:
        counts = torch.bincount(anchor, minlength=size)
        if self.aggregation_func is None:
            return losses.new_zeros(size).index_add(0, anchor, losses) / counts.clamp(min=1)
        order = anchor.argsort(stable=True)
        place = torch.arange(len(losses), device=losses.device) - (counts.cumsum(0) - counts)[anchor[order]]
        table = losses.new_zeros(size, int(counts.max()) if size else 0)
        made: Tensor = self.aggregation_func(table.index_put((anchor[order], place), losses[order]), counts)
        return made


@component
class MultipleReducers(Reducer):
    """Another reducer for each part of a loss, by the part's name; the results are added.

    Args:
        reducers: by part, as in `{"pos_loss": SumReducer(), "neg_loss": MeanReducer()}`.
        default_reducer: of the parts that `reducers` does not name; None is `MeanReducer()`.
    """

    reducers: dict[str, Reducer]
    default_reducer: Reducer = field(default_factory=MeanReducer)

    @property
    def needs_list(self) -> bool:
        return any(each.needs_list for each in (*dict(self.reducers).values(), self.default_reducer))

    def of(self, part: str) -> Reducer:
        known: dict[str, Reducer] = dict(self.reducers.items())
        return known.get(part, self.default_reducer)


@component
class DoNothingReducer(Reducer):
    """Reduces nothing: the loss returns its parts, each with its losses and their indices."""

    def forward(self, loss_dict: LossDict, embeddings: Tensor, labels: Tensor | None) -> LossDict:
        return loss_dict

    @property
    def needs_list(self) -> bool:
        return True


BaseReducer = Reducer
