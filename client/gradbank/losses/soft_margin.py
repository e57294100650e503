"""A loss that weighs triplets by where they lie among all that were seen."""

from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradbank.checks import MOST_BINS, check_batch, check_counts, check_finite
from gradbank.component import component
from gradbank.distances import Distance, LpDistance
from gradbank.engine import (
    Anchors,
    Indices,
    Pairs,
    Part,
    References,
    Statistic,
    as_triplets,
    evaluate,
    evaluate_triplets,
    listed_distances,
    widened,
)
from gradbank.engine.differences import Differences, Edges
from gradbank.losses.loss import Staged
from gradbank.losses.pair import PairLoss
from gradbank.reducers import MeanReducer, Reducer

_AT_ONCE = 2**20  # distances held at a time
_LEAST = 1e-6  # and the inverse the most that the histogram may begin away from 0


@component
class DynamicSoftMarginLoss(PairLoss):
    """Weighs each triplet by how many others have a smaller difference, in this batch and in those before.

        loss = mean_t CDF[bin of x_t] * x_t,   x = d[a, p] - d[a, n]

    over all triplets, without making them: see `gradbank.engine.differences`. The CDF is that of a running histogram
    of x, whose `num_bins` nodes start at `min_val`, `2 |min_val| / num_bins` apart; x is shared between the two that
    it lies between, and counts as the first or last beyond the ends (PML raises there).

    The histogram is differentiated as far as the current batch made it; PML raises at the second backward pass. It
    enters with each call that succeeds, is part of `state_dict`, and moves along with the loss.

    Without labels row i of `ref_emb` is the positive of row i: `d[a, n]` is then the smallest distance in row i or
    column i, other than `d[i, i]`. Where there are more rows of one than of the other, x is 0 for those, as in PML.

    Args:
        min_val: the smallest difference of interest, not 0; -2 is as small as it gets.
        num_bins: how many nodes the histogram has.
        momentum: the weight of the batch's triplets, each, against that of the histogram as a whole.

    Attributes:
        hist_: `(num_bins,)`, the histogram, of sum 1; zeros at first.

    Raises:
        ValueError: a distance other than `LpDistance(p=2)` of normalised embeddings, what are not 1 to 10,000 bins, or
            a `min_val` that is nearly 0, or far beyond all differences.

    Zhang and Rusinkiewicz, "Learning Local Descriptors With a CDF-Based Dynamic Soft Margin", ICCV 2019.
    """

    min_val: float = -2.0
    num_bins: int = 10
    momentum: float = 0.01
    distance: Distance = field(default_factory=LpDistance, kw_only=True)

    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require_distance(LpDistance, normalize_embeddings=True, p=2)
        self.num_bins = int(self.num_bins)
        check_counts(self, "num_bins", most=MOST_BINS)
        if not _LEAST <= abs(self.min_val) <= 1 / _LEAST:
            raise ValueError(f"min_val must be {_LEAST} to {1 / _LEAST:,.0f} away from 0, got {self.min_val}")
        self.register_buffer("hist_", torch.zeros(self.num_bins, dtype=torch.float64))
        self._made: list[Tensor] | None = None  # during a call, the histogram that it leads to

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = {prefix + "hist_": self.hist_}  # as it is, where the state is of PML, which saves no histogram
        super()._load_from_state_dict({**own, **state_dict}, prefix, *rest)

    def edges(self) -> Edges:
        """Where the nodes of the histogram lie, which are the lower edges of the CDF's bins."""
        return Edges(self.min_val, 2 * abs(self.min_val) / self.num_bins, self.num_bins)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Indices | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar; the arguments are those of every loss of pairs, of which labels may be left out."""
        return self.carried_out(embeddings, labels, indices_tuple, ref_emb, ref_labels)

    def stage(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Indices | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Staged:
        check_batch(embeddings, labels)
        for name, rows in (("embeddings", embeddings), ("ref_emb", ref_emb)):
            if rows is not None:
                check_finite(rows, name)
        made: list[Tensor] = []
        self._made = made
        try:
            if labels is None and indices_tuple is None:
                self.distance.check_shapes(embeddings, ref_emb)
                rows = widened(embeddings)
                others = rows if ref_emb is None or ref_emb is embeddings else widened(ref_emb)
                loss = self.at_once(self._of_views, rows, References((others,)))
            else:
                loss = super().forward(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        finally:
            self._made = None
        return Staged(loss, lambda: self._enter(made))

    def _enter(self, made: list[Tensor]) -> None:
        for histogram in made:
            self.hist_ = histogram

    def compare(self, embeddings: Tensor, references: References, pairs: Pairs) -> Any:
        value = evaluate(_OfTriplets(self), embeddings, references, pairs)
        return self.reduced(value, embeddings, pairs.anchor_labels)

    def compare_listed(
        self, embeddings: Tensor, references: References, indices: Indices, labels: Tensor | None
    ) -> Any:
        if len(indices) == 4:
            return super().compare_listed(embeddings, references, indices, labels)
        a, p, n = as_triplets(indices, (len(embeddings), len(references)), embeddings.device)
        value = evaluate_triplets(_OfTriplets(self), embeddings, references, (a, p, n))
        return self.reduced(value, embeddings, labels)

    def _of_views(self, rows: Tensor, references: References) -> Any:
        x = _hardest(self.distance, rows, references.whole())
        value = self.weighed(*self.edges().sums(x, torch.ones_like(x)))
        return self.reduced(value.to(rows.dtype), rows, None)

    def weighed(self, sums: Tensor, number: Tensor) -> Tensor:
        """The loss, `()`, of triplets whose differences are so many and come to so much in each bin, `(num_bins + 1,)`
        with what is below all nodes first; the histogram that it leads to waits for the end of the call."""
        if self._made is None:
            raise ValueError(
                "DynamicSoftMarginLoss remembers its batches, and here would not: it cannot be the loss of a "
                "CrossBatchMemory"
            )
        total = number.sum()
        if not total:
            return sums.sum()
        edges = self.edges()
        node = edges.low + edges.step * torch.arange(self.num_bins, dtype=sums.dtype, device=sums.device)
        passed = (sums[1:] - number[1:] * node) / edges.step  # to the next node
        passed = torch.cat([passed[:-1], passed[:1] * 0])
        histogram = number[1:] - passed + torch.nn.functional.pad(passed[:-1], (1, 0))
        histogram = histogram + torch.nn.functional.pad(number[:1], (0, self.num_bins - 1))
        before = self.get_buffer("hist_").to(histogram)
        momentum = self.momentum if before.any() else 1.0
        histogram = (1 - momentum) * before + momentum * histogram
        histogram = histogram / histogram.sum()
        self._made.append(histogram.detach())
        weight = histogram.cumsum(0)
        return (torch.cat([weight[:1], weight]) * sums).sum() / total


class _OfTriplets:
    joins_anchors = True

    def __init__(self, loss: DynamicSoftMarginLoss) -> None:
        self.loss, self.distance = loss, loss.distance
        self.reducer: Reducer = MeanReducer()

    def negatives(self, anchors: Anchors) -> Mapping[str, Statistic]:
        return {"differences": Differences(self.loss.edges())}

    def terms(self, anchors: Anchors) -> Mapping[str, Part]:
        sums, number = anchors.found["differences"][:2]
        assert number is not None
        return {"loss": anchors.reduced(self.loss.weighed(sums.sum(0), number.sum(0)))}


def _hardest(distance: Distance, rows: Tensor, others: Tensor) -> Tensor:
    """`d[i, i]` minus the smallest other distance in row i or column i, of an `(r, c)` matrix: `(max(r, c),)`, 0 beyond
    the diagonal's end; nothing where the matrix has no other entries."""
    height, width = len(rows), len(others)
    if height * width < 2:
        return (rows[:, :1] * 0).sum(1)[:0]
    own = torch.arange(min(height, width), device=rows.device)
    in_row, in_column = _nearest(distance, rows, others)
    in_column_is_nearer = in_column[0][: len(own)] < in_row[0][: len(own)]
    a = torch.where(in_column_is_nearer, in_column[1][: len(own)], own)
    n = torch.where(in_column_is_nearer, own, in_row[1][: len(own)])
    references = References((others,))
    near, far = (listed_distances(distance, rows, references, *pair) for pair in ((own, own), (a, n)))
    return torch.nn.functional.pad(near - far, (0, max(height, width) - len(own)))


def _nearest(distance: Distance, rows: Tensor, others: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The smallest entry of each row, and that of each column, off the diagonal: values, and where they are."""
    columns = distance.prepare(others.detach())
    in_row: list[tuple[Tensor, Tensor]] = []
    least = columns.new_full((len(columns),), torch.inf)
    place = torch.zeros_like(least, dtype=torch.int64)
    step = max(1, _AT_ONCE // len(columns))
    with torch.no_grad():
        for start in range(0, len(rows), step):
            d = distance.matrix(distance.prepare(rows[start : start + step]), columns)
            d[:, start:].fill_diagonal_(torch.inf)
            in_row.append(d.min(1))
            value, row = d.min(0)
            place = torch.where(value < least, row + start, place)
            least = torch.minimum(value, least)
    values, places = zip(*in_row)
    return (torch.cat(values), torch.cat(places)), (least, place)
