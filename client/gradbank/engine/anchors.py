"""What is known of the anchors when a loss is written: their positives, and statistics of their negatives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gradbank.reducers import Kept, Kind, Ratio, Reducer, add_up


class Gathered(NamedTuple):
    """A statistic of the negatives."""

    value: Tensor  # differentiable; one number per anchor, or what the statistic says
    number: Tensor | None = None  # a constant: how many losses each value is the sum of
    listed: tuple[Tensor, tuple[Tensor, ...]] | None = None  # those losses and their indices, for a reducer's eyes
    extra: Tensor | None = None  # a constant, by anchor: what else the statistic says that it knows


class Positives(NamedTuple):
    """Positive pairs, one entry each."""

    s: Tensor  # (P,) distance or similarity
    anchor: Tensor  # (P,) int64: the pair's anchor, 0 .. anchors - 1
    times: Tensor  # (P,) how often the pair counts
    other: Tensor  # (P,) int64: the pair's reference, 0 .. M - 1

    @staticmethod
    def none(like: Tensor) -> "Positives":
        """No pair, where `like` is and of its dtype."""
        s = like.new_zeros(0)
        return Positives(s, s.long(), s, s.long())


class Part(NamedTuple):
    """A named part of a loss, before it is reduced."""

    kind: Kind
    losses: Tensor  # of each anchor (b,) or positive (P,), or their sums (b,) if there are `counts`
    times: Tensor | None = None  # how often each loss counts; None is once
    anchor: Tensor | None = None  # whose loss each one is; None where they are one per anchor
    counts: Tensor | None = None  # (b,) of how many losses each one is the sum
    divisor: Tensor | float | None = None
    labels: Tensor | None = None  # of the anchors that the losses are added up by, if they are not the engine's
    listed: tuple[Tensor, tuple[Tensor, ...]] | None = None


@dataclass(frozen=True)
class Anchors:
    """`b` anchors with `P` positive pairs.

    Attributes:
        size: b.
        labels: `(b,)`, or None where pairs were listed without labels.
        embeddings: `(b, D)`, as they were given.
        positives: the pairs themselves; losses of pairs are written on `positives.s`.
        among_themselves: whether the references are the anchors: then `positives.other` is an anchor too.
        weight: `(b,)` what each anchor's loss is multiplied by, or None.
        place: which of the batch's anchors these are.
        interval: which negatives make a triplet with each positive, by their distances; None is all.
        found: the statistics that the loss asked for, by the names it gave them; none while it is asked.
    """

    size: int
    labels: Tensor | None
    embeddings: Tensor
    positives: Positives
    among_themselves: bool = False
    weight: Tensor | None = None
    place: slice = field(default_factory=lambda: slice(None))
    interval: Callable[[Tensor], Tensor] | None = None
    found: Mapping[str, Gathered] = field(default_factory=dict)

    @property
    def s(self) -> Tensor:
        """`(P,)` the distances or similarities of the positives."""
        return self.positives.s

    def each(self, values: Tensor) -> Tensor:
        """`(b,)` values of the anchors, given to each of their positives: `(P,)`."""
        # of which the gradient is added up in order, as that of indexing is not
        return values.index_select(0, self.positives.anchor)

    def sum(self, values: Tensor) -> Tensor:
        """`(P,)` values of the positives, added up by anchor: `(b,)`."""
        return values.new_zeros(self.size).index_add(0, self.positives.anchor, values)

    def number(self) -> Tensor:
        """`(b,)`: how many positives each anchor has."""
        return self.sum(self.positives.times)

    def largest(self, values: Tensor) -> Tensor:
        """`(P,)` values of the positives, the largest by anchor: `(b,)`, -inf where there are none; no gradient."""
        none = values.new_full((self.size,), -torch.inf)
        return none.scatter_reduce(0, self.positives.anchor, values.detach(), "amax")

    def logsumexp(self, values: Tensor) -> Tensor:
        """`(P,)` values of the positives, log-sum-exp by anchor: `(b,)`, -inf where there are none."""
        most = self.largest(values)
        some = ~most.isneginf()
        most = torch.where(some, most, 0)
        total = self.sum((values - self.each(most)).exp())
        return torch.where(some, most + torch.where(some, total, 1).log(), -torch.inf)

    def per_anchor(self, losses: Tensor, kept: Tensor | None = None, divisor: Tensor | float | None = None) -> Part:
        """The part whose losses are those of the anchors: `(b,)`, times the anchors' weight; where `kept` is false
        there is none."""
        if self.weight is not None:
            losses = losses * self.weight
        return Part("element", losses, None if kept is None else kept.to(losses.dtype), divisor=divisor)

    def per_positive(self, losses: Tensor) -> Part:
        """The part whose losses are those of the positive pairs: `(P,)`."""
        return Part("pos_pair", losses, self.positives.times, self.positives.anchor)

    def per_negative(self, name: str) -> Part:
        """The part whose losses are those of an `Each` of that name."""
        return self._sums("neg_pair", name)

    def per_triplet(self, name: str, divisor: Tensor | float | None = None) -> Part:
        """The part whose losses are those of a statistic of triplets of that name."""
        return self._sums("triplet", name)._replace(divisor=divisor)

    def reduced(self, value: Tensor, weight: Tensor | None = None) -> Part:
        """The part that is a number already: no reducer is asked.

        Args:
            weight: how much these anchors have a say in it, where it is written on some anchors at a time; 0 is none.
        """
        return Part("already_reduced", value, counts=weight)

    def _sums(self, kind: Kind, name: str) -> Part:
        found = self.found[name]
        return Part(kind, found.value, counts=found.number, listed=found.listed)

    def reduce(self, part: Part, reducer: Reducer) -> Ratio:
        """What `reducer` makes of a part."""
        if part.kind == "already_reduced":
            value = part.losses.double()
            return Ratio(value, None) if part.counts is None else Ratio(value * part.counts, part.counts)
        labels = self.labels if part.labels is None else part.labels
        if part.counts is not None:
            return reducer.combine(Kept(part.losses, part.counts, part.kind, labels, part.divisor))
        size = self.size if part.labels is None else len(part.labels)
        kept = add_up(reducer, part.kind, part.losses, part.times, part.anchor, size, labels, part.divisor)
        return reducer.combine(kept)

    def listing(self, part: Part) -> dict[str, object]:
        """A part as a reducer that sees every loss takes it."""
        indices: object = None
        losses = part.losses
        if part.listed is not None:
            losses, indices = part.listed
        elif part.kind == "pos_pair":
            indices = (self.positives.anchor, self.positives.other)
        elif part.kind == "already_reduced" and part.counts is not None:
            losses = losses * (part.counts > 0)  # with no say, there is none
        elif part.kind == "element":
            indices = torch.arange(len(losses), device=losses.device)
            if part.times is not None:
                indices = indices.repeat_interleave(part.times.long())
                losses = losses[indices]
        made = {"losses": losses, "indices": indices, "reduction_type": part.kind}
        return made if part.divisor is None else {**made, "divisor": part.divisor}
