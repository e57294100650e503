"""What every miner shares: the call, its checks, and what it counts."""

from dataclasses import field
from typing import Any

import torch
from torch import Tensor

from gradbank.arguments import default_getter
from gradbank.checks import as_labels, check_batch
from gradbank.component import foundation
from gradbank.distances import Distance, LpDistance
from gradbank.engine import Indices, LabelledPairs, ListedPairs, Pairs, References, full_precision
from gradbank.overrides import is_ours, refuse_uncalled
from gradbank.recorder import Recorder


@foundation
class Miner(Recorder):
    """Chooses the pairs or triplets that are worth their gradient.

    A miner of your own defines `mine`, which lists them. One that can tell a tile of pairs which of them it keeps
    defines `select` instead (see `PairMiner`), so that a queue needs no list.

    Args:
        distance: how far apart embeddings are.
        collect_stats: whether `mine` also writes the statistics that the class names; None is no.

    Attributes:
        num_pos_pairs, num_neg_pairs, num_triplets: how many of each the last call listed; in a queue of which the
            miner makes no list, how many it took, with `collect_stats`.
    """

    distance: Distance = field(default_factory=LpDistance, kw_only=True)
    num_pos_pairs: int = field(default=0, init=False)
    num_neg_pairs: int = field(default=0, init=False)
    num_triplets: int = field(default=0, init=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if is_ours(cls, "mine") and cls.mine is not Miner.mine:
            refuse_uncalled(cls, _NOT_CALLED, "override mine, which lists what is chosen")

    def __post_init__(self) -> None:
        self.reset_stats()

    get_default_distance = default_getter("distance")

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Indices:
        """The chosen `(a, p, n)` or `(a1, p, a2, n)`, int64: anchors are rows of `embeddings`, others of `ref_emb`.

        A batch mined by itself comes as the very same objects: then no anchor is its own positive.
        """
        raise NotImplementedError(f"{type(self).__name__} must define mine")

    def select(self, embeddings: Tensor, references: References, pairs: LabelledPairs) -> Pairs | Indices:
        """What is chosen of the pairs that labels make, for a queue: pairs, or listed triplets `(a, p, n)`."""
        ref_emb = references.whole().to(embeddings.dtype)  # a queue keeps that of its first batch
        chosen = self(embeddings, pairs.labels, ref_emb, pairs.ref_labels)
        return chosen if len(chosen) == 3 else ListedPairs(chosen, (len(embeddings), len(references)))

    def chosen_of(self, embeddings: Tensor, references: References, pairs: LabelledPairs) -> Pairs | Indices:
        """`select`; or a list, where a subclass of a miner that has one overrides how that lists."""
        if self.overrides("select"):
            return Miner.select(self, embeddings, references, pairs)
        return self.select(embeddings, references, pairs)

    def overrides(self, name: str) -> bool:
        """Whether a class that is written on the one with this method has another `mine` or `forward`."""
        classes = type(self).__mro__
        last = next(place for place, cls in enumerate(classes) if name in vars(cls))
        return any(each in vars(cls) for cls in classes[:last] for each in ("mine", "forward"))

    def watch(self, embeddings: Tensor, references: References, taken: Pairs) -> None:
        """Writes the statistics of what was taken of a queue without a list. What is listed is counted already."""

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Indices:
        """The chosen `(a, p, n)` or `(a1, p, a2, n)`, int64; pass them to a loss as its `indices_tuple`.

        Args:
            embeddings: `(B, D)` floats, and labels: `(B,)`.
            ref_emb: `(M, D)` references, and ref_labels: `(M,)`. Without the embeddings, the batch's own are meant;
                without the labels, or if they are the very object `labels`, reference i is anchor i, and no anchor is
                its own positive.

        Raises:
            ValueError: a shape that does not fit.
        """
        any_shape = self.distance is not None and self.distance.takes_any_shape
        check_batch(embeddings, labels, any_shape=any_shape)
        if labels is None:
            raise ValueError(f"{type(self).__name__} needs labels: they say which pairs are positive")
        is_self = ref_labels is None or ref_labels is labels
        rows = embeddings if ref_emb is None else ref_emb
        check_batch(rows, labels if is_self else ref_labels, "ref_emb", "ref_labels", any_shape)
        if ref_emb is not None or any_shape:
            self.distance.check_shapes(embeddings, ref_emb)
        labels = as_labels(labels, embeddings.device)
        known = labels if is_self or ref_labels is None else as_labels(ref_labels, embeddings.device)
        return self._listed(embeddings, labels, rows, known)

    def _listed(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Indices:
        self.reset_stats()
        with torch.no_grad(), full_precision(embeddings.device):
            chosen = self.mine(embeddings, labels, ref_emb, ref_labels)
        self.output_assertion(chosen)
        return chosen

    def output_assertion(self, chosen: Indices) -> None:
        """Refuses what is no list of pairs or triplets, and counts what is.

        Raises:
            TypeError: neither three nor four tensors.
            ValueError: lists of different lengths.
        """
        name = f"{type(self).__name__}.mine"
        if len(chosen) not in (3, 4):
            raise TypeError(f"{name} must return (a, p, n) or (a1, p, a2, n), got {len(chosen)} tensors")
        sizes = [len(index) for index in chosen]
        if len(chosen) == 3:
            self.num_triplets = sizes[0]
            fits = sizes[0] == sizes[1] == sizes[2]
        else:
            self.num_pos_pairs, self.num_neg_pairs = sizes[0], sizes[2]
            fits = sizes[0] == sizes[1] and sizes[2] == sizes[3]
        if not fits:
            raise ValueError(f"{name} must return an anchor for each of the others, got lists of {sizes}")


BaseMiner = Miner  # what PML calls it

_NOT_CALLED = (
    *("set_stats", "set_idx", "should_select_largest", "filter_original_indices", "get_bins", "filter_by_bin"),
    *("get_uniformly_distributed_pairs", "get_mine_function", "get_positives", "get_negatives"),
    *("get_max_per_row", "get_min_per_row", "get_x_per_row", "get_func_for_stats"),
)


def check_unit_euclidean(miner: Miner) -> None:
    """Refuses any distance but the Euclidean one of unit vectors.

    Raises:
        ValueError: the miner's distance is another one.
    """
    distance = miner.distance
    wanted = isinstance(distance, LpDistance) and distance.normalize_embeddings
    if not wanted or (distance.p, distance.power) != (2, 1):
        raise ValueError(f"{type(miner).__name__} works on LpDistance(True, p=2, power=1) only, got {distance}")
