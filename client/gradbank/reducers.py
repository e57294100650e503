"""Reducers: from what each pair, triplet or anchor costs to one number.

Every reducer here first says which losses count (those between its `bounds`) and then makes one number of their sums
and counts per anchor. So an engine can add losses up, anchor by anchor, without ever listing them; a reducer of your
own that wants the list, written as in pytorch-metric-learning, gets it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gradbank.component import component, foundation
from gradbank.recorder import Recorder

Bounds = tuple[float | None, float | None]
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
class Reducer(Recorder):
    """A mean over the losses that lie strictly between two bounds.

    A reducer of your own overrides `element_reduction`, `pos_pair_reduction`, `neg_pair_reduction` and
    `triplet_reduction`, each called with `(losses, indices, embeddings, labels)`, or `forward` as a whole. It then
    sees every loss, so every loss is held in memory.

    Where a loss has several parts, statistics are those of the last; a `MultipleReducers` has a reducer for each.

    Attributes:
        losses_size: with `collect_stats`, how many losses there were.
    """

    losses_size: int | None = field(default=None, init=False)

    @property
    def bounds(self) -> Bounds:
        """The losses that count lie strictly between these; None is no bound."""
        return None, None

    @property
    def needs_list(self) -> bool:
        """Whether the reducer must see every loss: it has methods that are not the ones below."""
        names = ("forward", "combine", *(f"{kind}_reduction" for kind in _KINDS))
        return any(getattr(type(self), name).__module__ != __name__ for name in names)

    @property
    def collects(self) -> bool:
        """Whether it writes statistics, or one within it does."""
        return bool(self.collect_stats)

    def of(self, part: str) -> "Reducer":
        """The reducer of the part of a loss that has this name."""
        return self

    def counts(self) -> Mapping[str, Bounds]:
        """The statistics that are numbers of losses, each with the bounds that those losses lie between."""
        return {"losses_size": (None, None)}

    def tallies(self) -> "list[tuple[Reducer, Tally]]":
        """What finds the statistics of it and of those within: tallies, each with the reducer that leads there."""
        if not self.collect_stats:
            return []
        names: dict[Bounds, list[str]] = {}
        for name, bounds in self.counts().items():
            names.setdefault(bounds, []).append(name)
        made = [Tally(self, alike, bounds) for bounds, alike in names.items()]
        return [(each, each) for each in made]

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
        if self.collects:
            self._record(loss_dict, embeddings, labels)
        return torch.stack(parts).sum()

    @torch.no_grad()
    def _record(self, loss_dict: LossDict, embeddings: Tensor, labels: Tensor | None) -> None:
        for name, part in loss_dict.items():
            tallies = self.of(name).tallies()
            for reducer, _ in tallies:
                reducer._reduced(part, embeddings, labels)
            write([tally for _, tally in tallies])

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


class Tally(Reducer):
    """Stands in for a reducer to find a statistic of it, or of a loss.

    Args:
        owner: whose statistic it is.
        names: what that is called there, perhaps several things.
        bounds: the losses that count lie strictly between these.
        measure: what the statistic is of these losses; None is their number. What was computed apart is added up.
    """

    def __init__(
        self,
        owner: Recorder,
        names: Sequence[str],
        bounds: Bounds = (None, None),
        measure: Callable[[Kept], Ratio] | None = None,
    ) -> None:
        super().__init__()
        self.owner, self.names, self.between = owner, names, bounds
        self.measure = measure or (lambda kept: Ratio(kept.counts.sum(dtype=torch.float64), None))
        self.found: Ratio | None = None

    @property
    def bounds(self) -> Bounds:
        return self.between

    def combine(self, kept: Kept) -> Ratio:
        made = self.measure(kept)
        self.found = made if self.found is None else self.found.plus(made)
        return made

    def already_reduced_reduction(self, losses: Tensor, indices: Any, embeddings: Tensor, labels: Any) -> Tensor:
        self.take_one(losses)
        return losses.reshape(())

    def take_one(self, loss: Tensor) -> None:
        """Takes in a part that is one number already: no reducer asks whether that counts."""
        if "losses_size" in self.names:
            self.found = Ratio(torch.ones_like(loss, dtype=torch.float64).sum(), None)

    def value(self) -> float:
        """The statistic, 0 if there was nothing to be seen; a whole number is an int."""
        value = 0.0 if self.found is None else float(self.found.value().detach())
        return int(value) if value.is_integer() else value


def write(tallies: Sequence[Tally]) -> None:
    """Sets the statistics that were tallied, and the others of their owners to 0."""
    for tally in tallies:
        tally.owner.reset_stats()
    for tally in tallies:
        for name in tally.names:
            setattr(tally.owner, name, tally.value())


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


@foundation
class BoundedReducer(Reducer):
    """A mean over the losses that lie between bounds of which there is at least one.

    Attributes:
        num_past_filter: with `collect_stats`, how many losses lie between the bounds.
        num_above_low, num_below_high: how many are above the lower one, and below the upper one; 0 where there is none.
    """

    num_past_filter: int | None = field(default=None, init=False)
    num_above_low: int | None = field(default=None, init=False)
    num_below_high: int | None = field(default=None, init=False)

    def counts(self) -> Mapping[str, Bounds]:
        low, high = self.bounds
        made: dict[str, Bounds] = {"num_past_filter": (low, high)}
        if low is not None:
            made["num_above_low"] = low, None
        if high is not None:
            made["num_below_high"] = None, high
        return {**super().counts(), **made}


@component
class ThresholdReducer(BoundedReducer):
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
    def bounds(self) -> Bounds:
        return self.low, self.high


@component
class AvgNonZeroReducer(BoundedReducer):
    """The mean over the losses above 0: `ThresholdReducer(low=0)`."""

    @property
    def bounds(self) -> Bounds:
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

    Attributes:
        divisor: with `collect_stats`, what the last call divided by.

    Raises:
        ValueError: a loss that gives none, when it is called.
    """

    divisor: float | None = field(default=None, init=False)

    def tallies(self) -> list[tuple[Reducer, Tally]]:
        if not self.collect_stats:
            return []
        divisor = Tally(self, ["divisor"], measure=lambda kept: Ratio(self._divisor(kept), None))
        return [*super().tallies(), (divisor, divisor)]

    def combine(self, kept: Kept) -> Ratio:
        return Ratio(kept.sums.sum(dtype=torch.float64), self._divisor(kept))

    def _divisor(self, kept: Kept) -> Tensor:
        if kept.divisor is None:
            raise ValueError("DivisorReducer needs a loss that gives a divisor (MarginLoss or ProxyAnchorLoss do)")
        return torch.as_tensor(kept.divisor, dtype=torch.float64, device=kept.sums.device)


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
    def bounds(self) -> Bounds:
        return None, None

    @property
    def collects(self) -> bool:
        return super().collects or self.reducer.collects

    def tallies(self) -> list[tuple[Reducer, Tally]]:
        within = [(PerAnchorReducer(inner, self.aggregation_func), tally) for inner, tally in self.reducer.tallies()]
        return [*super().tallies(), *within]

    def combine(self, kept: Kept) -> Ratio:
        times = kept.counts if kept.kind == "element" else torch.ones_like(kept.counts)
        means = kept.sums / kept.counts.clamp(min=1)
        return self.reducer.combine(
            add_up(self.reducer, "element", means, times, None, len(means), kept.labels, kept.divisor)
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

    @property
    def collects(self) -> bool:
        return any(each.collects for each in (*dict(self.reducers).values(), self.default_reducer))

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
