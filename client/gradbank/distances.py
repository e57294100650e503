"""Distances and similarities between embeddings: `(B, D)` and `(M, D)` give `(B, M)`."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradbank.component import component, foundation
from gradbank.recorder import Recorder


@foundation
class Distance(Recorder):
    """How far apart two embeddings are.

    A *similarity* is an inverted distance: larger is closer. Losses never ask which they hold: they ask
    `margin` for a signed difference and `closeness` for a matrix in which larger is closer.

    A distance of your own overrides `compute_mat`; every engine then works with it.

    Args:
        normalize_embeddings: divide each embedding by its `p`-norm first.
        p: the norm, for normalising and (in `LpDistance`) for the distance itself.
        power: the exponent put on every entry of the matrix.

    Attributes:
        initial_avg_query_norm, initial_avg_ref_norm: with `collect_stats`, the mean `p`-norms of what the last call (or
            a loss's or miner's) compared, and final_avg_query_norm, final_avg_ref_norm: the same after `prepare`.
    """

    normalize_embeddings: bool = True
    p: float = 2
    power: float = 1
    initial_avg_query_norm: float | None = field(default=None, init=False)
    initial_avg_ref_norm: float | None = field(default=None, init=False)
    final_avg_query_norm: float | None = field(default=None, init=False)
    final_avg_ref_norm: float | None = field(default=None, init=False)

    is_inverted: ClassVar[bool] = False

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> Tensor:
        """The `(B, M)` matrix between `(B, D)` queries and `(M, D)` references (themselves if None).

        Raises:
            ValueError: an input that is not two-dimensional, or dimensions that differ.
        """
        self.check_shapes(query_emb, ref_emb)
        queries = self.prepare(query_emb)
        mat = self.matrix(queries, queries if ref_emb is None else self.prepare(ref_emb))
        self.record(query_emb, (query_emb if ref_emb is None else ref_emb,))
        return mat

    def prepare(self, embeddings: Tensor) -> Tensor:
        """`(N, D)` embeddings as `matrix` wants them: normalised, unless told not to."""
        if not self.normalize_embeddings:
            return embeddings
        norms = torch.linalg.vector_norm(embeddings, ord=self.p, dim=-1, keepdim=True)
        scaled: Tensor = embeddings * norms.clamp(min=1e-12).reciprocal()  # a division for each row, not each number
        return scaled

    def matrix(self, queries: Tensor, references: Tensor) -> Tensor:
        """The `(B, M)` matrix between prepared embeddings."""
        return self.raised(self.compute_mat(queries, references))

    def raised(self, mat: Tensor) -> Tensor:
        """`mat` to the power that the distance has."""
        return mat if self.power == 1 else mat.square() if self.power == 2 else mat**self.power

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        """Prepared `(P, D)` queries, each with the reference of its own row: `(P,)`. A subclass may do it better."""
        few = zip(torch.split(queries, _PAIRS_AT_ONCE), torch.split(references, _PAIRS_AT_ONCE))
        return torch.cat([self.matrix(q, r).diagonal() for q, r in few])

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """The `(B, M)` matrix before `power`: the one method that a distance must write."""
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

    def pull(
        self, queries: Tensor, references: Tensor, s: Tensor, weight: Tensor, of_both: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of `(weight * s).sum()`, where `s` is `matrix(queries, references)`: `(B, D)` at the queries
        and, if `of_both`, `(M, D)` at the references. May write to `weight`, `(B, M)`."""
        raise NotImplementedError(f"{type(self).__name__} leaves its gradient to autograd")

    def computes_as(self, kind: "type[Distance]") -> bool:
        """Whether its matrix is computed by what `kind` defines, and not by a subclass of a user's own."""
        return all(getattr(type(self), name) is getattr(kind, name) for name in ("compute_mat", "matrix", "raised"))

    @property
    def sign(self) -> int:
        """1 where larger is closer, -1 where it is farther."""
        return 1 if self.is_inverted else -1

    def margin(self, x: "Tensor | float", y: "Tensor | float") -> Tensor:
        """How much farther `x` is than `y`: positive when it is."""
        return y - x if self.is_inverted else x - y  # type: ignore[return-value]

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

    def check_shapes(self, query_emb: Tensor, ref_emb: Tensor | None) -> None:
        """Refuses, by ValueError, inputs that are not two-dimensional or differ in dimension."""
        for name, rows in (("embeddings", query_emb), ("ref_emb", ref_emb)):
            if rows is not None and rows.ndim != 2:
                raise ValueError(f"{name} must be (rows, dimension), got shape {tuple(rows.shape)}")
        if ref_emb is not None and ref_emb.shape[1] != query_emb.shape[1]:
            raise ValueError(
                f"embeddings and ref_emb must have the same dimension, got {query_emb.shape[1]} and {ref_emb.shape[1]}"
            )


_PAIRS_AT_ONCE = 32  # rows of a matrix of which only the diagonal is wanted
_NUMBERS_AT_ONCE = 2**18  # of the rows whose norms are taken


@component
class LpDistance(Distance):
    """The Lp distance: `d[a, b] = (sum_k |a_k - b_k|^p)^(power / p)`."""

    @property
    def knows_pull(self) -> bool:
        return self.p == 2 and self.power in (1, 2) and self.computes_as(LpDistance)

    @property
    def gradient_reads_matrix(self) -> bool:
        return not (self.knows_pull and self.power == 2)

    def pull(
        self, queries: Tensor, references: Tensor, s: Tensor, weight: Tensor, of_both: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if self.power == 1:
            weight = _without_nan(weight.div_(s), s)
        of_queries, of_references = _toward(queries, references, weight, self.power, True, of_both)
        assert of_queries is not None
        return of_queries, of_references

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        if self.p == 2 and max(len(query_emb), len(ref_emb)) > _DIRECT_AT_MOST:
            made: Tensor = _Euclidean.apply(query_emb, ref_emb)  # type: ignore[no-untyped-call]
            return made
        return torch.cdist(query_emb, ref_emb, p=self.p)

    def matrix(self, queries: Tensor, references: Tensor) -> Tensor:
        if (self.p, self.power) == (2, 2) and max(len(queries), len(references)) > _DIRECT_AT_MOST:
            made: Tensor = _SquaredEuclidean.apply(queries, references)  # type: ignore[no-untyped-call]
            return made
        return super().matrix(queries, references)

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        return self.raised(torch.linalg.vector_norm(queries - references, ord=self.p, dim=1))


_DIRECT_AT_MOST = 25  # rows whose distances are sums of squared differences, exact; as torch.cdist has it


class _SquaredEuclidean(torch.autograd.Function):
    """`|a - b|^2 = |a|^2 + |b|^2 - 2 a . b`, by one matrix product each way."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return _squares(a, b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        return _toward(a, b, gradient, 2, *ctx.needs_input_grad)


class _Euclidean(torch.autograd.Function):
    """Its square root: `torch.cdist`, which copies both its arguments for each matrix."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        d = _squares(a, b).sqrt_()
        ctx.save_for_backward(a, b, d)
        return d

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b, d = ctx.saved_tensors
        return _toward(a, b, _without_nan(gradient / d, d), 1, *ctx.needs_input_grad)


def _without_nan(quotient: Tensor, d: Tensor) -> Tensor:
    """What was divided by distances, 0 where these are: there is no direction, and the gradient is 0. Written to."""
    if d.device.type != "cpu" or not d.numel() or not d.amin() > 0:
        quotient.nan_to_num_(0, 0, 0)
    return quotient


def _squares(a: Tensor, b: Tensor) -> Tensor:
    norms = a.square().sum(1, keepdim=True) + b.square().sum(1)
    return norms.addmm_(a, b.T, alpha=-2).clamp_(min=0)


def _toward(
    a: Tensor, b: Tensor, weight: Tensor, times: float, of_a: bool, of_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The weighted sums of the differences `a - b`, times `times`: over each a, and (the other way) over each b."""
    return (
        torch.addmm(a * weight.sum(1, keepdim=True), weight, b, alpha=-1).mul_(times) if of_a else None,
        torch.addmm(b * weight.sum(0)[:, None], weight.T, a, alpha=-1).mul_(times) if of_b else None,
    )


@component
class CosineSimilarity(Distance):
    """`s[a, b] = a . b / (|a| |b|)`: larger is closer, 1 at most. It always normalises."""

    normalize_embeddings: bool = field(default=True, init=False)
    is_inverted: ClassVar[bool] = True

    @property
    def is_product(self) -> bool:
        return self.power == 1 and self.computes_as(CosineSimilarity)

    @property
    def knows_pull(self) -> bool:
        return self.is_product

    def pull(
        self, queries: Tensor, references: Tensor, s: Tensor, weight: Tensor, of_both: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return weight @ references, weight.mT @ queries if of_both else None

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return query_emb @ ref_emb.mT

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        return self.raised((queries * references).sum(1))


@component
class DotProductSimilarity(Distance):
    """`s[a, b] = a . b`: larger is closer. Like its namesake it normalises unless told not to."""

    is_inverted: ClassVar[bool] = True

    @property
    def is_product(self) -> bool:
        return self.power == 1 and self.computes_as(DotProductSimilarity)

    @property
    def knows_pull(self) -> bool:
        return self.is_product

    def pull(
        self, queries: Tensor, references: Tensor, s: Tensor, weight: Tensor, of_both: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return weight @ references, weight.mT @ queries if of_both else None

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return query_emb @ ref_emb.mT

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        return self.raised((queries * references).sum(1))


@component
class SNRDistance(Distance):
    """The noise-to-signal ratio: `d[a, b] = Var(a - b) / Var(a)`, each over the D numbers of an embedding.

    It is not symmetric: the anchor is the signal.

    Yuan et al., "Signal-to-Noise Ratio: A Robust Distance Metric for Deep Metric Learning", CVPR 2019.
    """

    def prepare(self, embeddings: Tensor) -> Tensor:
        """`(N, D)` embeddings as `matrix` wants them: normalised, unless told not to, and less their mean."""
        return _centered(super().prepare(embeddings))

    def _measured(self, embeddings: Tensor) -> Tensor:
        return super().prepare(embeddings)  # a mean that is taken off is not part of a norm

    @property
    def knows_pull(self) -> bool:
        return self.power == 1 and self.computes_as(SNRDistance)

    def pull(
        self, queries: Tensor, references: Tensor, s: Tensor, weight: Tensor, of_both: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        inverse = queries.square().sum(1, keepdim=True).reciprocal_()
        of_queries, of_references = _toward_signal(queries, references, inverse, s, weight, True, of_both)
        assert of_queries is not None
        return of_queries, of_references

    def matrix(self, queries: Tensor, references: Tensor) -> Tensor:
        made: Tensor = _NoiseToSignal.apply(queries, references)  # type: ignore[no-untyped-call]
        return self.raised(made)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        made: Tensor = _NoiseToSignal.apply(_centered(query_emb), _centered(ref_emb))  # type: ignore[no-untyped-call]
        return made

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        return self.raised((queries - references).square().sum(1) / queries.square().sum(1))


def _centered(rows: Tensor) -> Tensor:
    return rows - rows.mean(1, keepdim=True)


class _NoiseToSignal(torch.autograd.Function):
    """`|a - b|^2 / |a|^2` of centered rows: from one matrix product each way, so that nothing of B * M * D is made."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        inverse = a.square().sum(1, keepdim=True).reciprocal_()
        s = _squares(a, b).mul_(inverse)
        ctx.save_for_backward(a, b, inverse, s)
        return s

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b, inverse, s = ctx.saved_tensors
        of_a, of_b = ctx.needs_input_grad
        return _toward_signal(a, b, inverse, s, gradient, of_a, of_b)


def _toward_signal(
    a: Tensor, b: Tensor, inverse: Tensor, s: Tensor, weight: Tensor, of_a: bool, of_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of `(weight * s).sum()`: at each a, of the numerator and of the denominator, and at each b."""
    at_a, at_b = None, None
    if of_a:
        at_a, _ = _toward(a, b, weight, 2, True, False)
        assert at_a is not None
        at_a.addcmul_(a, (weight * s).sum(1, keepdim=True), value=-2).mul_(inverse)
    if of_b:
        _, at_b = _toward(a, b, weight * inverse, 2, False, True)
    return at_a, at_b


@component
class BatchedDistance(Distance):
    """Hands `distance` the queries in batches, each of whose matrices goes to `iter_fn` and is then forgotten.

    Args:
        distance: what measures; its attributes are this one's too.
        iter_fn: called with `(matrix, start, end)`, the `(end - start, M)` distances of those queries. A function
            cannot be sent to a server.
        batch_size: queries at a time.
    """

    distance: Distance
    iter_fn: Any = field(default=None, metadata={"wire": False})
    batch_size: int = 32
    normalize_embeddings: bool = field(default=True, init=False)
    p: float = field(default=2, init=False)
    power: float = field(default=1, init=False)

    def __post_init__(self) -> None:
        for name in ("normalize_embeddings", "p", "power", "is_inverted"):
            setattr(self, name, getattr(self.distance, name))
        if self.collect_stats is None:
            self.collect_stats = self.distance.collect_stats

    def forward(self, query_emb: Tensor, ref_emb: Tensor | None = None) -> None:  # type: ignore[override]
        """Calls `iter_fn` with the distances of each batch of `(B, D)` queries, and returns nothing."""
        ref_emb = query_emb if ref_emb is None else ref_emb
        for start in range(0, len(query_emb), self.batch_size):
            end = min(start + self.batch_size, len(query_emb))
            self.iter_fn(self.distance(query_emb[start:end], ref_emb), start, end)
        for each in (self.distance, self):  # of all queries, rather than of the last batch
            each.record(query_emb, (ref_emb,))

    def prepare(self, embeddings: Tensor) -> Tensor:
        return self.distance.prepare(embeddings)

    def _measured(self, embeddings: Tensor) -> Tensor:
        return self.distance._measured(embeddings)

    def matrix(self, queries: Tensor, references: Tensor) -> Tensor:
        return self.distance.matrix(queries, references)

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        return self.distance.pairs(queries, references)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "distance":
                raise
            return getattr(self.distance, name)


BaseDistance = Distance
