"""Regularizers: a cost of the embeddings (or weights) themselves, whatever their labels."""

import math
from dataclasses import field

import torch
from torch import Tensor

from gradbank.checks import check_batch
from gradbank.component import component, foundation
from gradbank.distances import CosineSimilarity, Distance, LpDistance
from gradbank.engine.precision import full_precision, widened
from gradbank.mismatch import Mismatch
from gradbank.recorder import Recorder
from gradbank.reducers import DivisorReducer, LossDict, MeanReducer, Reducer
from gradbank.reducers.kept import part_of_each

__all__ = [
    "BaseRegularizer",
    "CenterInvariantRegularizer",
    "LpRegularizer",
    "RegularFaceRegularizer",
    "Regularizer",
    "SparseCentersRegularizer",
    "ZeroMeanRegularizer",
]

TILE = 2**22
"""How many similarities between rows are held at a time."""


@foundation
class Regularizer(Recorder):
    """A cost of the rows of a matrix, reduced to one number.

    A regularizer of your own overrides `costs`, or `compute_loss` if it is not made of one cost per row.

    Args:
        distance: how rows are compared, in those that compare any.
        reducer: how the costs become one number.
    """

    distance: Distance = field(default_factory=LpDistance, kw_only=True)
    reducer: Reducer = field(default_factory=MeanReducer, kw_only=True)

    def costs(self, rows: Tensor) -> Tensor:
        """What each of the `(N, D)` rows costs: `(N,)`."""
        raise NotImplementedError(f"{type(self).__name__} must define costs, or compute_loss")

    def compute_loss(self, rows: Tensor) -> LossDict:
        """What is to be reduced: by name, the losses, their indices and their kind."""
        return {"loss": part_of_each(self.costs(rows))}

    def forward(self, rows: Tensor) -> Tensor:
        """The cost of `(N, D)` rows, a scalar.

        Raises:
            ValueError: rows that are not `(N, D)` floats.
        """
        check_batch(rows, None, "the rows to regularize")
        with full_precision(rows.device):
            rows = widened(rows)
            value: Tensor = self.reducer(self.compute_loss(rows), rows, torch.arange(len(rows), device=rows.device))
        return value


@component
class LpRegularizer(Regularizer):
    """Keeps rows short: `loss[a] = |x_a|_p ^ power`."""

    p: float = 2
    power: float = 1

    def costs(self, rows: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(rows, ord=self.p, dim=1)
        raised: Tensor = norms if self.power == 1 else norms**self.power
        return raised


@component
class ZeroMeanRegularizer(Regularizer):
    """Keeps the mean of each row's entries at zero: `loss[a] = |sum_k x_ak|`."""

    def costs(self, rows: Tensor) -> Tensor:
        return rows.sum(1).abs()


@component
class CenterInvariantRegularizer(Regularizer):
    """Keeps rows equally long.

        loss[a] = (|x_a|^2 - mean_b |x_b|^2)^2 / 4

    Raises:
        ValueError: a distance other than `LpDistance(normalize_embeddings=False)` of power 1; its p is the norm's.

    Wu et al., "Deep Face Recognition with Center Invariant Loss", ACM MM Thematic Workshops 2017.
    """

    distance: Distance = field(default_factory=lambda: LpDistance(normalize_embeddings=False), kw_only=True)

    def __post_init__(self) -> None:
        fits = isinstance(self.distance, LpDistance) and self.distance.power == 1
        if not fits or self.distance.normalize_embeddings:
            raise Mismatch(
                "CenterInvariantRegularizer compares norms: distance must be LpDistance(normalize_embeddings=False) "
                f"with power=1, got {self.distance}"
            )

    def costs(self, rows: Tensor) -> Tensor:
        squares = torch.linalg.vector_norm(rows, ord=self.distance.p, dim=1).square()
        deviation: Tensor = squares - squares.mean()
        return deviation.square() / 4


@component
class RegularFaceRegularizer(Regularizer):
    """Keeps each row away from the one that is closest to it.

        loss[a] = max_{b != a} s[a, b]

    The closest rows are looked for tile by tile, so that memory does not grow with the square of N.

    Raises:
        ValueError: a distance of which larger is not closer.

    Zhao et al., "RegularFace: Deep Face Recognition via Exclusive Regularization", CVPR 2019.
    """

    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)

    def __post_init__(self) -> None:
        if not self.distance.is_inverted:
            raise Mismatch(
                "RegularFaceRegularizer wants a similarity, such as CosineSimilarity, as its distance; got "
                f"{self.distance}"
            )

    def costs(self, rows: Tensor) -> Tensor:
        self.distance.record(rows, (rows,))
        prepared = self.distance.prepare(rows)
        closest = self._closest(prepared.detach())
        return self.distance.pairs(prepared, prepared.index_select(0, closest))

    @torch.no_grad()
    def _closest(self, prepared: Tensor) -> Tensor:
        """`(N,)`: which other row is closest to each."""
        number = len(prepared)
        step = max(1, int(TILE**0.5))
        best = prepared.new_full((number,), -torch.inf)
        closest = torch.zeros(number, dtype=torch.int64, device=prepared.device)
        for top in range(0, number, step):
            rows = slice(top, top + step)
            for left in range(0, number, step):
                tile = self.distance.matrix(prepared[rows], prepared[left : left + step])
                if left == top:
                    tile.fill_diagonal_(-torch.inf)
                found, column = tile.max(dim=1)
                closest[rows] = torch.where(found > best[rows], column + left, closest[rows])
                best[rows] = torch.maximum(found, best[rows])
        return closest


@component
class SparseCentersRegularizer(Regularizer):
    """Draws the centers of a class together, so that only as many are left as the class needs.

        loss[a, b] = sqrt(2 - 2 cos(w_a, w_b))      over all pairs of centers of one class

    divided by twice the number of pairs. Centers that coincide cost 0 and get no gradient (PML's is NaN).

    Args:
        num_classes: C.
        centers_per_class: K; rows `c * K` to `c * K + K - 1` of the `(C * K, D)` weights are the centers of class c.

    Attributes:
        same_class_center_sim, diff_class_center_sim: if `collect_stats`, the mean cosines between centers of one
            class, and of different ones.

    Raises:
        ValueError: fewer than two centers a class, a distance other than `CosineSimilarity`, or, when it is called,
            another number of rows.

    Qian et al., "SoftTriple Loss: Deep Metric Learning Without Triplet Sampling", ICCV 2019.
    """

    num_classes: int
    centers_per_class: int
    distance: Distance = field(default_factory=CosineSimilarity, kw_only=True)
    reducer: Reducer = field(default_factory=DivisorReducer, kw_only=True)

    same_class_center_sim: float | None = field(default=None, init=False)
    diff_class_center_sim: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.num_classes < 1 or self.centers_per_class < 2:
            raise Mismatch(
                "SparseCentersRegularizer wants num_classes >= 1 and centers_per_class > 1, got "
                f"num_classes={self.num_classes} and centers_per_class={self.centers_per_class}"
            )
        if not isinstance(self.distance, CosineSimilarity):
            raise Mismatch(
                f"SparseCentersRegularizer works on angles: distance must be CosineSimilarity, got {self.distance}"
            )

    def compute_loss(self, rows: Tensor) -> LossDict:
        classes, centers = self.num_classes, self.centers_per_class
        if len(rows) != classes * centers:
            raise Mismatch(
                f"SparseCentersRegularizer({classes}, {centers}) wants {classes * centers} rows, the centers of each "
                f"class after those of the one before, got {len(rows)}"
            )
        self.distance.record(rows, (rows,))
        prepared = self.distance.prepare(rows)
        blocks = prepared.reshape(classes, centers, -1)
        a, b = torch.triu_indices(centers, centers, 1, device=rows.device)
        alike = self.distance.matrix(blocks, blocks)
        same = alike[:, a, b].flatten()
        if self.collect_stats:
            self._note(prepared.detach(), alike.detach(), same.detach())
        squares = 2 - 2 * same
        apart = squares > 0
        # the root's derivative is infinite at 0
        losses = torch.where(apart, torch.where(apart, squares, 1).sqrt(), 0)
        return {"loss": part_of_each(losses, divisor=2 * len(losses))}

    def _note(self, prepared: Tensor, alike: Tensor, same: Tensor) -> None:
        number, step = len(prepared), max(1, TILE // len(prepared))
        tiles = (self.distance.matrix(prepared[i : i + step], prepared) for i in range(0, number, step))
        of_all = sum(float(tile.sum()) for tile in tiles)
        different = number**2 - alike.numel()
        self.same_class_center_sim = float(same.mean())
        self.diff_class_center_sim = (of_all - float(alike.sum())) / different if different else math.nan


BaseRegularizer = Regularizer
