"""Reducers with others inside, by anchor or by part of the loss, and the one that leaves the parts as they are."""

from collections.abc import Iterable, Mapping
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradbank.component import component
from gradbank.overrides import is_ours
from gradbank.reducers.base import Reducer, Tally, is_nothing
from gradbank.reducers.kept import Kept, LossDict, Ratio, add_up
from gradbank.reducers.means import MeanReducer

_PART = "loss"  # what PML calls the anchors' means


@component
class PerAnchorReducer(Reducer):
    """First the mean over each anchor's pairs (or triplets), 0 where it has none; then `reducer` over the anchors.

    Args:
        reducer: how the anchors' means become one number; None is `MeanReducer()`.
        aggregation_func: in place of the mean: called with `(B, K)` losses by anchor, K at least B, zeros where an
            anchor has fewer, and the number of losses of each; gives `(B,)`. A function cannot be sent to a server.

    Raises:
        TypeError: an aggregation_func that cannot be called.
    """

    reduces_alike: ClassVar[bool] = False

    reducer: Reducer = field(default_factory=MeanReducer)
    aggregation_func: Any = None

    def __post_init__(self) -> None:
        if self.aggregation_func is not None and not callable(self.aggregation_func):
            raise TypeError(f"aggregation_func must be a function, got {self.aggregation_func!r}")
        _check_reduces("PerAnchorReducer", [self.reducer])

    @property
    def needs_list(self) -> bool:
        return self.aggregation_func is not None or self.reducer.needs_list or super().needs_list

    @property
    def collects(self) -> bool:
        return super().collects or self.reducer.collects

    def tallies(self) -> list[tuple[Reducer, Tally]]:
        tallies = self.reducer.of(_PART).tallies()
        within = [(PerAnchorReducer(inner, self.aggregation_func), tally) for inner, tally in tallies]
        return [*super().tallies(), *within]

    def combine(self, kept: Kept) -> Ratio:
        times = kept.counts if kept.kind == "element" else torch.ones_like(kept.counts)
        means = kept.sums / kept.counts.clamp(min=1)
        inner = self.reducer.of(_PART)
        return inner.combine(add_up(inner, "element", means, times, None, len(means), kept.labels, kept.divisor))

    def _reduced(self, part: Mapping[str, Any], embeddings: Tensor, labels: Tensor | None) -> Any:
        losses, kind = part["losses"], part["reduction_type"]
        if not self.needs_list or is_nothing(losses) or kind == "already_reduced":
            return super()._reduced(part, embeddings, labels)
        if kind != "element":
            losses = self._aggregated(losses, part["indices"][0], len(embeddings))
            part = {"losses": losses, "indices": torch.arange(len(losses), device=losses.device)}
        return self.reducer.called(_PART, {**part, "reduction_type": "element"}, embeddings, labels)

    def _aggregated(self, losses: Tensor, anchor: Tensor, size: int) -> Tensor:
        counts = torch.bincount(anchor, minlength=size)
        if self.aggregation_func is None:
            return losses.new_zeros(size).index_add(0, anchor, losses) / counts.clamp(min=1)
        order = anchor.argsort(stable=True)
        place = torch.arange(len(losses), device=losses.device) - (counts.cumsum(0) - counts)[anchor[order]]
        table = losses.new_zeros(size, max(size, int(counts.max())) if size else 0)  # as wide as PML's, or wider
        made: Tensor = self.aggregation_func(table.index_put((anchor[order], place), losses[order]), counts)
        return made


@component
class MultipleReducers(Reducer):
    """Another reducer for each part of a loss, by the part's name; the results are added.

    Args:
        reducers: by part, as in `{"pos_loss": SumReducer(), "neg_loss": MeanReducer()}`.
        default_reducer: of the parts that `reducers` does not name; None is `MeanReducer()`.
    """

    takes_every_part: ClassVar[bool] = True

    reducers: dict[str, Reducer]
    default_reducer: Reducer = field(default_factory=MeanReducer)

    def __post_init__(self) -> None:
        if not isinstance(self.reducers, Mapping | nn.ModuleDict):
            raise TypeError(
                f"reducers are given by the names of the parts of a loss, got a {type(self.reducers).__name__}"
            )
        _check_reduces("MultipleReducers", dict(self.reducers.items()).values())

    @property
    def needs_list(self) -> bool:
        own = super().needs_list or not is_ours(type(self), "sub_loss_reduction")
        return own or any(each.needs_list for each in (*dict(self.reducers).values(), self.default_reducer))

    def sub_loss_reduction(self, sub_losses: Tensor, embeddings: Any = None, labels: Any = None) -> Tensor:
        """The parts' `(P,)` results together: their sum, unless a subclass does something else."""
        return sub_losses.sum()

    def _together(self, parts: list[Tensor], embeddings: Tensor, labels: Tensor | None) -> Tensor:
        if is_ours(type(self), "sub_loss_reduction"):
            return super()._together(parts, embeddings, labels)
        return self.sub_loss_reduction(torch.stack(parts), embeddings, labels)

    @property
    def collects(self) -> bool:
        return any(each.collects for each in (*dict(self.reducers).values(), self.default_reducer))

    def of(self, part: str) -> Reducer:
        known: dict[str, Reducer] = dict(self.reducers.items())
        found = known.get(part, self.default_reducer)
        return found if found.needs_list else found.of(part)  # one that sees every loss is called


def _check_reduces(within: str, reducers: Iterable[Any]) -> None:
    """Refuses, by TypeError, what gives no number to a reducer around it."""
    for each in reducers:
        if each is None or isinstance(each, DoNothingReducer):
            raise TypeError(f"{within} takes what makes one number of losses, got {type(each).__name__}")


@component
class DoNothingReducer(Reducer):
    """Reduces nothing: the loss returns its parts, each with its losses and their indices."""

    takes_every_part: ClassVar[bool] = True

    def forward(self, loss_dict: LossDict, embeddings: Tensor, labels: Tensor | None) -> LossDict:
        return loss_dict

    @property
    def needs_list(self) -> bool:
        return True
