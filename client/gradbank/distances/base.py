"""What every distance has in common."""

from collections.abc import Callable, Sequence
from dataclasses import field
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gradbank.component import foundation
from gradbank.overrides import is_ours, refuse_uncalled
from gradbank.recorder import Recorder


@foundation
class Distance(Recorder):
    """How far apart two embeddings are.

    A *similarity* is an inverted distance: larger is closer. Losses never ask which they hold: they ask
    `margin` for a signed difference and `closeness` for a matrix in which larger is closer.

    A distance of your own overrides `compute_mat`, and perhaps `maybe_normalize`; every engine then works with it.

    Args:
        normalize_embeddings: divide each embedding by its `p`-norm first.
        p: the norm, for normalising and (in `LpDistance`) for the distance itself.
        power: the exponent put on every entry of the matrix.
        is_inverted: whether larger is closer; None is what the class says, and no if it says nothing.

    Attributes:
        initial_avg_query_norm, initial_avg_ref_norm: with `collect_stats`, the mean `p`-norms of what the last call (or
            a loss's or miner's) compared, and final_avg_query_norm, final_avg_ref_norm: the same after `prepare`.
    """

    normalize_embeddings: bool = True
    p: float = 2
    power: float = 1
    is_inverted: bool = field(default_factory=bool)
    initial_avg_query_norm: float | None = field(default=None, init=False)
    initial_avg_ref_norm: float | None = field(default=None, init=False)
    final_avg_query_norm: float | None = field(default=None, init=False)
    final_avg_ref_norm: float | None = field(default=None, init=False)

    _inverted: ClassVar[bool] = False  # where the constructor is not told
    _normalizes_itself: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if not is_ours(cls):
            refuse_uncalled(
                cls,
                _NOT_CALLED,
                "a distance is its compute_mat, of what maybe_normalize makes of embeddings, and is_inverted says that "
                "larger is closer",
                "losses and miners",
            )
        if isinstance(own.get("is_inverted"), bool):
            cls._inverted = own["is_inverted"]
        elif isinstance(own.get("is_inverted"), property):
            raise TypeError(f"{cls.__name__}.is_inverted must be True or False, or an argument, and not a property")
        if "compute_mat" in own:  # what it inherits of ours may know a quicker way to what is no longer computed
            for name in _WAYS_AROUND - own.keys():
                if is_ours(cls, name):
                    setattr(cls, name, getattr(Distance, name))
        cls._normalizes_itself = any(
            getattr(cls, name) is not getattr(Distance, name) for name in ("maybe_normalize", "normalize")
        )

    def get_default_is_inverted(self) -> bool:
        """Whether larger is closer, where the constructor is not told."""
        return self._inverted

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        """The `(B, M)` matrix between `(B, D)` queries and `(M, D)` references (themselves if None), in their dtype;
        that of half precision is computed in float32.

        Raises:
            ValueError: an input that is not two-dimensional, or dimensions that differ.
        """
        self.check_shapes(query_emb, ref_emb)
        if query_emb.dtype in (torch.float16, torch.bfloat16):  # in which squares overflow
            wide = self.forward(query_emb.float(), None if ref_emb is None else ref_emb.float())
            return wide if torch.is_autocast_enabled(query_emb.device.type) else wide.to(query_emb.dtype)
        queries = self.prepare(query_emb)
        mat = self.matrix(queries, queries if ref_emb is None else self.prepare(ref_emb))
        self.record(query_emb, (query_emb if ref_emb is None else ref_emb,))
        return mat

    def prepare(self, embeddings: Tensor) -> Tensor:
        """`(N, D)` embeddings as `matrix` wants them: normalised, unless told not to."""
        if self._normalizes_itself:
            return self.normalized(self.maybe_normalize(embeddings), None)
        return self.normalized(embeddings, self.inverse_norms(embeddings))

    def maybe_normalize(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
        """`normalize`, unless told not to: what `compute_mat` gets. A subclass may do something else here."""
        return self.normalize(embeddings, dim=dim, **kwargs) if self.normalize_embeddings else embeddings

    def normalize(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
        """Embeddings divided by their `p`-norms along `dim`; `torch.nn.functional.normalize` gets the rest."""
        return F.normalize(embeddings, p=self.p, dim=dim, **kwargs)

    def get_norm(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
        """The `p`-norms along `dim`; `torch.linalg.vector_norm` gets the rest."""
        return torch.linalg.vector_norm(embeddings, ord=self.p, dim=dim, **kwargs)  # type: ignore[no-any-return]  # torch's

    def normalized(self, embeddings: Tensor, inverse: Tensor | None) -> Tensor:
        """`prepare`, given what `inverse_norms` made of the embeddings."""
        return embeddings if inverse is None else embeddings * inverse

    def inverse_norms(self, embeddings: Tensor, squares: Tensor | None = None) -> Tensor | None:
        """`(N, 1)`: what normalising multiplies each embedding by; None where it is told not to.

        Args:
            squares: `(N,)` the embeddings' squared lengths, where they are known already.
        """
        if not self.normalize_embeddings:
            return None
        if self.p == 2 and embeddings.dtype in _HOLD_SQUARES:  # quicker
            squares = embeddings.square().sum(-1) if squares is None else squares
            return squares[..., None].clamp(min=1e-24).sqrt().reciprocal()  # rsqrt's gradient is a third power
        norms = torch.linalg.vector_norm(embeddings, ord=self.p, dim=-1, keepdim=True)
        inverse: Tensor = norms.clamp(min=1e-12).reciprocal()  # a division for each row, not each number
        return inverse

    def matrix(self, queries: Tensor, references: Tensor) -> Tensor:
        """The `(B, M)` matrix between prepared embeddings."""
        return self.raised(self.compute_mat(queries, references))

    def tile(self, queries: Tensor, references: Tensor, squares: Tensor | None) -> Tensor:
        """`matrix`, where the `(M,)` squared lengths of the references may be known, before anything is taken off."""
        return self.matrix(queries, references)

    def raised(self, mat: Tensor) -> Tensor:
        """`mat` to the power that the distance has."""
        if isinstance(self.power, Tensor):  # which may be learned
            return mat.pow(self.power)
        if self.power in (1, 2):
            return mat if self.power == 1 else mat.square()
        if not 0 < self.power < 1:
            return mat**self.power
        none = mat == 0  # where the power has no slope
        return mat.masked_fill(none, 1.0).pow(self.power).masked_fill(none, 0.0)

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        """Prepared `(P, D)` queries, each with the reference of its own row: `(P,)`."""
        return self.raised(self.pairwise_distance(queries, references))

    def pairwise_distance(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """The diagonal of `compute_mat`, `(P,)`, for `(P, D)` queries, each with the reference of its own row: neither
        normalised nor with `power`. A subclass may compute it better."""
        few = zip(torch.split(query_emb, _PAIRS_AT_ONCE), torch.split(ref_emb, _PAIRS_AT_ONCE))
        return torch.cat([self.compute_mat(q, r).diagonal() for q, r in few])

    @property
    def is_its_matrix(self) -> bool:
        """Whether `compute_mat` is one's own, which then says what the distance of a pair is too."""
        return not is_ours(type(self), "compute_mat")

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """The `(B, M)` matrix before `power`, a new tensor: the one method that a distance must write."""
        raise NotImplementedError(f"{type(self).__name__} must define compute_mat")

    def measures_as(self, other: "Distance") -> bool:
        """Whether it is the same distance, statistics aside."""
        mine, theirs = ({**each.arguments(), "collect_stats": None} for each in (self, other))
        return type(self) is type(other) and mine == theirs

    @property
    def is_product(self) -> bool:
        """Whether `matrix(queries, references)` is `queries @ references.T`."""
        return False

    @property
    def knows_pull(self) -> bool:
        """Whether `pull` gives the gradient of `matrix`, so that autograd need not."""
        return False

    @property
    def gradient_reads_matrix(self) -> bool:
        """Whether the gradient of `matrix` is computed from what it made, which is then not to be written to."""
        return not self.is_product

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Between which two numbers all entries of the matrix lie, up to rounding; None if that is not known."""
        return None

    def pull(
        self, queries: Tensor, references: Tensor, s: Tensor, weight: Tensor, of_both: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of `(weight * s).sum()`, where `s` is `matrix(queries, references)`: `(B, D)` at the queries
        and, if `of_both`, `(M, D)` at the references. May write to `weight`, `(B, M)`."""
        raise NotImplementedError(f"{type(self).__name__} leaves its gradient to autograd")

    def pull_of_pairs(
        self, queries: Tensor, anchor: Tensor, s: Tensor, weight: Tensor, sums: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The same at the `(B, D)` queries, for `(P,)` pairs in place of a matrix.

        Args:
            anchor: `(P,)` the query of each pair.
            s: `(P,)` their entries of the matrix, and weight: `(P,)` their weights.
            sums: from `(P,)` weights to the weighted sums of the pairs' normalised references, `(B, D)`.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves its gradient to autograd")

    def computes_as(self, kind: "type[Distance]") -> bool:
        """Whether its matrix is computed by what `kind` defines, and not by a subclass of a user's own."""
        return _computes_as(type(self), kind)  # type: ignore[arg-type]  # mypy asks a class for its instances' hash

    @property
    def sign(self) -> int:
        """1 where larger is closer, -1 where it is farther."""
        return 1 if self.is_inverted else -1

    def margin(self, x: "Tensor | float", y: "Tensor | float") -> Tensor:
        """How much farther `x` is than `y`: positive when it is."""
        return y - x if self.is_inverted else x - y  # type: ignore[return-value]  # a float of two floats

    def smallest_dist(self, *args: Any, **kwargs: Any) -> Any:
        """`torch.min`, or `torch.max` where larger is closer: the closest."""
        return (torch.max if self.is_inverted else torch.min)(*args, **kwargs)

    def largest_dist(self, *args: Any, **kwargs: Any) -> Any:
        """`torch.max`, or `torch.min` where larger is closer: the farthest."""
        return (torch.min if self.is_inverted else torch.max)(*args, **kwargs)

    def closeness(self, mat: Tensor) -> Tensor:
        """`mat` with larger meaning closer."""
        return mat if self.is_inverted else -mat

    def record(self, queries: Tensor, references: Sequence[Tensor]) -> None:
        """Writes the statistics of a call that compared `(B, D)` rows with `(M, D)` others, laid end to end in pieces;
        nothing, if they are not collected."""
        if not self.collect_stats:
            return
        dtype = torch.promote_types(queries.dtype, torch.float32)  # as they are compared
        self.initial_avg_query_norm, self.final_avg_query_norm = self._mean_norms((queries,), dtype)
        among_themselves = len(references) == 1 and references[0] is queries
        self.initial_avg_ref_norm, self.final_avg_ref_norm = (
            (self.initial_avg_query_norm, self.final_avg_query_norm)
            if among_themselves
            else self._mean_norms(references, dtype)
        )

    def _measured(self, embeddings: Tensor) -> Tensor:
        """The prepared embeddings, as statistics take them."""
        return self.prepare(embeddings)

    @torch.no_grad()
    def _mean_norms(self, pieces: Sequence[Tensor], dtype: torch.dtype) -> tuple[float, float]:
        """The mean `p`-norm of all rows, as they are and prepared: 0 of none."""
        total = torch.zeros(2, dtype=torch.float64)
        for piece in pieces:
            for rows in torch.split(piece.detach(), max(1, _NUMBERS_AT_ONCE // max(piece.shape[1], 1))):
                given = rows.to(dtype)
                for i, each in enumerate((given, self._measured(given))):
                    norms = torch.linalg.vector_norm(each, ord=self.p, dim=1, dtype=torch.float64)
                    total[i] += norms.sum().cpu()
        initial, final = (total / max(sum(map(len, pieces)), 1)).tolist()
        return initial, final

    @property
    def takes_any_shape(self) -> bool:
        """Whether it says itself which embeddings it compares, as one of tokens does: `(B, T, D)`."""
        return not is_ours(type(self), "check_shapes")

    def check_shapes(self, query_emb: Tensor, ref_emb: Tensor | None) -> None:
        """Refuses, by ValueError, inputs that are not two-dimensional or differ in dimension. A distance of embeddings
        of another shape overrides it, along with `maybe_normalize` and `compute_mat`."""
        for name, rows in (("embeddings", query_emb), ("ref_emb", ref_emb)):
            if rows is not None and rows.ndim != 2:
                raise ValueError(f"{name} must be (rows, dimension), got shape {tuple(rows.shape)}")
        if ref_emb is not None and ref_emb.shape[1] != query_emb.shape[1]:
            raise ValueError(
                f"embeddings and ref_emb must have the same dimension, got {query_emb.shape[1]} and {ref_emb.shape[1]}"
            )


@cache
def _computes_as(kind: type[Distance], known: type[Distance]) -> bool:
    names = ("prepare", "normalized", "inverse_norms", "compute_mat", "matrix", "raised", "_normalizes_itself")
    return all(getattr(kind, name) is getattr(known, name) for name in names)


_NOT_CALLED = ("forward", "margin", "smallest_dist", "largest_dist", "set_default_stats")
_WAYS_AROUND = {"normalized", "matrix", "tile", "pairs", "pairwise_distance"}  # `compute_mat`, which may differ
_HOLD_SQUARES = (torch.float32, torch.float64)  # of the smallest norms that matter
_PAIRS_AT_ONCE = 32  # rows of a matrix of which only the diagonal is wanted
_NUMBERS_AT_ONCE = 2**18  # of the rows whose norms are taken
