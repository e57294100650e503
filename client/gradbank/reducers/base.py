"""What every reducer has in common, and the tallies that find its statistics: reducers themselves."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradbank.component import foundation
from gradbank.overrides import is_ours, refuse_uncalled
from gradbank.recorder import Recorder
from gradbank.reducers.kept import Bounds, Kept, Kind, LossDict, Ratio, add_up


@foundation
class Reducer(Recorder):
    """A mean over the losses that lie strictly between two bounds.

    A reducer of your own overrides `element_reduction`, `pos_pair_reduction`, `neg_pair_reduction` and
    `triplet_reduction`, each called with `(losses, indices, embeddings, labels)`, the first in place of those that it
    does not override; or `forward` as a whole, which is called for each part of a loss by itself, of a copy that is the
    part's. It then sees every loss, so every loss is held in memory.

    Where a loss has several parts, statistics are those of the last; a `MultipleReducers` has a reducer for each.

    Attributes:
        losses_size: with `collect_stats`, how many losses there were.
    """

    losses_size: int | None = field(default=None, init=False)

    reduces_alike: ClassVar[bool] = True
    """Whether an `element_reduction` of one's own is also that of pairs and triplets, as of PML's mean."""

    takes_every_part: ClassVar[bool] = False
    """Whether a `forward` of one's own is called once with all parts of a loss, and not with each."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if all(is_ours(cls, name) for name in ("forward", "combine", *_REDUCTIONS)):
            refuse_uncalled(
                cls, _NOT_CALLED, "override element_reduction, pos_pair_reduction and their like, or forward as a whole"
            )

    @property
    def bounds(self) -> Bounds:
        """The losses that count lie strictly between these; None is no bound."""
        return None, None

    @property
    def needs_list(self) -> bool:
        """Whether the reducer must see every loss: it has methods that are not of this package."""
        return any(map(self._is_own, ("forward", "combine", "zero_loss", *_REDUCTIONS)))

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
                inside = margin.clamp(0, 1).ceil_()  # not a mask, for masks are slow; and NaN stays what it is
                kept = inside if kept is None else kept * inside
        if weight is None:
            return torch.ones_like(losses) if kept is None else kept
        # a loss that was not asked for may be none, and 0 * NaN would be NaN
        return weight if kept is None else torch.where(weight > 0, weight * kept, 0)

    def combine(self, kept: Kept) -> Ratio:
        """One number of the losses that count."""
        return Ratio(kept.sums.sum(dtype=torch.float64), kept.counts.sum(dtype=torch.float64))

    def __call__(self, loss_dict: LossDict, *args: Any, **kwargs: Any) -> Any:
        """`forward`, with its hooks; of a class of one's own, part by part."""
        if len(loss_dict) < 2 or self.takes_every_part or not self._is_own("forward"):
            return super().__call__(loss_dict, *args, **kwargs)
        made = (self._of_its_own(name)({name: part}, *args, **kwargs) for name, part in loss_dict.items())
        return functools.reduce(torch.add, made)

    def _of_its_own(self, part: str) -> "Reducer":
        """A copy for a part of a loss, for it may remember something; one that learns is the same for all."""
        copies: dict[str, Reducer] = self.__dict__.setdefault("_copies", {})
        if part not in copies:
            made = self if list(self.parameters()) else copy.deepcopy(self)
            if made is not self:
                made.__dict__.pop("_copies", None)
            copies[part] = made
        return copies[part]

    def forward(self, loss_dict: LossDict, embeddings: Tensor, labels: Tensor | None) -> Any:
        """Reduces listed losses to a scalar.

        Args:
            loss_dict: parts by name, each with its `losses` (`(N,)`, or 0), their `indices` (`(N,)` anchors, or a
                pair or triplet of such lists), their `reduction_type` and, if the loss has one, a `divisor`.
            embeddings: `(B, D)`, and labels: `(B,)` or None: what the indices point at.
        """
        reducers = {name: self.of(name) for name in loss_dict}
        parts = [
            each.called(name, loss_dict[name], embeddings, labels)
            if each is not self
            else self._reduced(loss_dict[name], embeddings, labels)
            for name, each in reducers.items()
        ]
        made = self._together(parts, embeddings, labels)
        if self.collects:
            self._record(loss_dict, embeddings, labels)
        return made

    def called(self, name: str, part: Mapping[str, Any], embeddings: Tensor, labels: Tensor | None) -> Any:
        """What it makes of a part of a loss as the reducer within another: by a `forward` of its own, if it has one."""
        if self._is_own("forward") or self.takes_every_part:
            return self({name: part}, embeddings, labels)
        return self._reduced(part, embeddings, labels)

    def _together(self, parts: list[Tensor], embeddings: Tensor, labels: Tensor | None) -> Tensor:
        """The sum of the parts: of numbers, or of what a reducer of one's own keeps of the losses."""
        return functools.reduce(torch.add, parts)

    @torch.no_grad()
    def _record(self, loss_dict: LossDict, embeddings: Tensor, labels: Tensor | None) -> None:
        for name, part in loss_dict.items():
            tallies = self.of(name).tallies()
            for reducer, _ in tallies:
                reducer._reduced(part, embeddings, labels)
            write([tally for _, tally in tallies])

    def _reduced(self, part: Mapping[str, Any], embeddings: Tensor, labels: Tensor | None) -> Tensor:
        losses, kind = part["losses"], part["reduction_type"]
        if is_nothing(losses):
            return self.zero_loss(embeddings)
        # methods of a user's own take no divisor
        divides = "divisor" in part and kind != "already_reduced" and not self.needs_list
        extra = {"divisor": part["divisor"]} if divides else {}
        name = f"{kind}_reduction"
        if kind in _LISTED and self.reduces_alike and not self._is_own(name) and self._is_own("element_reduction"):
            name = "element_reduction"
        made: Tensor = getattr(self, name)(losses, part["indices"], embeddings, labels, **extra)
        return made

    def zero_loss(self, embeddings: Tensor) -> Tensor:
        """A loss of 0 that backpropagates to the embeddings: what a reducer gives where there is nothing to reduce."""
        return (embeddings * 0).sum()

    def _is_own(self, name: str) -> bool:
        """Whether a method is not of this package."""
        return not f"{getattr(type(self), name).__module__}.".startswith(_PACKAGE)

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


_LISTED = ("pos_pair", "neg_pair", "triplet")
_REDUCTIONS = tuple(f"{kind}_reduction" for kind in ("already_reduced", "element", *_LISTED))
_NOT_CALLED = (
    *("reduce_the_loss", "unpack_loss_info", "get_reduction_func", "input_is_zero_loss", "set_losses_size_stat"),
    *("element_reduction_helper", "tuple_reduction_helper", "sum_and_divide", "set_stats"),
    *("assert_sizes", *(f"assert_sizes_{kind}" for kind in ("already_reduced", "element", "pair", *_LISTED))),
)
_PACKAGE = __name__.removesuffix("base")  # with the dot at its end


def is_nothing(losses: Any) -> bool:
    """Whether a part has no losses: none are listed, or 0 stands for them. No reducer is asked about these."""
    return not losses.numel() if isinstance(losses, Tensor) else losses == 0


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
