"""Batches of any shape, in any use: tiles of any size give what the whole matrix gives, value and every gradient."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from gradbank import distances, engine, losses, miners, reducers
from gradbank.engine import Bounds
from gradbank.losses import BaseMetricLossFunction

from .conftest import bounds, examples

C = 5  # the most classes that a batch has, but for labels that are all distinct


def between(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda x: round(x, 3))


def options(**each: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the arguments."""
    return st.fixed_dictionaries({}, optional=each)


ARGUMENTS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "AngularLoss": options(alpha=between(10, 55)),
    "CircleLoss": options(m=between(0.1, 0.5), gamma=between(1, 100)),
    "ContrastiveLoss": options(pos_margin=between(0.013, 0.5), neg_margin=between(0.3, 1.6)),
    "DynamicSoftMarginLoss": options(min_val=st.sampled_from([-2.0, -1.1]), num_bins=st.integers(1, 14)),
    "FastAPLoss": options(num_bins=st.integers(1, 12)),
    "GeneralizedLiftedStructureLoss": options(neg_margin=between(0.3, 1.5), pos_margin=between(0, 0.4)),
    "HistogramLoss": options(n_bins=st.integers(1, 40)),
    "InstanceLoss": options(gamma=between(1, 64)),
    "IntraPairVarianceLoss": options(pos_eps=between(0.01, 0.3), neg_eps=between(0.01, 0.3)),
    "LiftedStructureLoss": options(neg_margin=between(0.3, 1.5), pos_margin=between(0, 0.4)),
    "MarginLoss": options(
        margin=between(0.05, 0.5),
        nu=between(0, 0.3),
        beta=between(0.7, 1.4),
        learn_beta=st.booleans(),
        num_classes=st.just(20),
    ),
    "MultiSimilarityLoss": options(alpha=between(0.5, 5), beta=between(1, 50), base=between(0.2, 1)),
    "NCALoss": options(softmax_scale=between(0.5, 8)),
    "NPairsLoss": options(),
    "NTXentLoss": options(temperature=between(0.03, 1)),
    "PNPLoss": options(variant=st.sampled_from(["Ds", "Dq", "Iu", "Ib", "O"]), anneal=between(0.02, 0.5)),
    "RankedListLoss": st.fixed_dictionaries(
        {"margin": between(0.1, 0.6), "Tn": between(0, 5)},
        optional={"Tp": between(0, 5), "imbalance": between(0, 1), "alpha": between(0.8, 1.5)},
    ),
    "SignalToNoiseRatioContrastiveLoss": options(pos_margin=between(0.013, 0.5), neg_margin=between(0.3, 1.6)),
    "SmoothAPLoss": options(temperature=between(0.02, 0.5)),
    "SupConLoss": options(temperature=between(0.03, 1)),
    "ThresholdConsistentMarginLoss": options(margin_plus=between(0.3, 0.95), margin_minus=between(-0.3, 0.6)),
    "TripletMarginLoss": options(margin=between(0.013, 0.8), smooth_loss=st.booleans(), swap=st.booleans()),
    "TupletMarginLoss": options(margin=between(0, 20), scale=between(1, 64)),
}
BY_ORDER = ("InstanceLoss", "NPairsLoss")  # of the rows, as PML's
DISTANCES: dict[str, Callable[[], distances.Distance]] = {
    "Lp": distances.LpDistance,
    "squared": lambda: distances.LpDistance(power=2),
    "L1": lambda: distances.LpDistance(p=1),
    "not normalised": lambda: distances.LpDistance(normalize_embeddings=False),
    "cosine": distances.CosineSimilarity,
    "dot": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
    "SNR": distances.SNRDistance,
}
REDUCERS: dict[str, Callable[[], reducers.Reducer]] = {
    "mean": reducers.MeanReducer,
    "sum": reducers.SumReducer,
    "nonzero": reducers.AvgNonZeroReducer,
    "above": lambda: reducers.ThresholdReducer(low=0.2037),
    "below": lambda: reducers.ThresholdReducer(high=0.7041),
    "between": lambda: reducers.ThresholdReducer(low=0.1093, high=0.9107),
    "by class": lambda: reducers.ClassWeightedReducer(torch.linspace(0.5, 2, 20, dtype=torch.float64)),
    "by anchor": reducers.PerAnchorReducer,
    "sum by anchor": lambda: reducers.PerAnchorReducer(reducers.SumReducer()),
    "by part": lambda: reducers.MultipleReducers(
        {"pos_loss": reducers.SumReducer(), "neg_loss": reducers.ThresholdReducer(low=0.1093)},
        reducers.PerAnchorReducer(reducers.AvgNonZeroReducer()),
    ),
}
MINERS: dict[str, Callable[[], miners.Miner]] = {
    "pairs": lambda: miners.MultiSimilarityMiner(0.3),
    "pairs by margin": lambda: miners.PairMarginMiner(0.3, 1.2),
    "triplets": lambda: miners.TripletMarginMiner(0.4),
    "semihard": lambda: miners.TripletMarginMiner(0.4, "semihard"),
    "hardest": miners.BatchHardMiner,
}


@dataclass(frozen=True)
class Use:
    """A loss, what it compares with what, and which gradients are asked for."""

    name: str
    arguments: dict[str, Any]
    distance: str | None
    reducer: str | None
    embeddings: Tensor
    labels: Tensor
    form: str  # "batch", "references" or "queue"
    ref_emb: Tensor | None = None
    ref_labels: Tensor | None = None
    learns_references: bool = True
    memory: int = 0
    earlier: tuple[tuple[Tensor, Tensor], ...] = ()  # batches in the queue
    miner: str | None = None
    indices: tuple[Tensor, ...] | None = None
    entering: Tensor | None = None  # which rows only enter the queue

    def __repr__(self) -> str:
        shape = f"B={len(self.embeddings)}, D={self.embeddings.shape[1]}, labels={self.labels.tolist()}"
        more = f"distance={self.distance!r}, reducer={self.reducer!r}, form={self.form!r}, miner={self.miner!r}"
        rows = None if self.ref_emb is None else len(self.ref_emb)
        queue = f"memory={self.memory}, earlier={[len(rows) for rows, _ in self.earlier]}, entering={self.entering}"
        return f"{self.name}({self.arguments}): {shape}, {more}, references={rows}, {queue}, indices={self.indices}"

    def loss(self) -> Any:
        given: dict[str, Any] = dict(self.arguments)
        if self.distance is not None:
            given["distance"] = DISTANCES[self.distance]()
        if self.reducer is not None:
            given["reducer"] = REDUCERS[self.reducer]()
        made = getattr(losses, self.name)(**given)
        if self.form == "queue":
            miner = None if self.miner is None else MINERS[self.miner]()
            made = losses.CrossBatchMemory(made, self.embeddings.shape[1], self.memory, miner)
        made = made.double()
        for batch in self.earlier:
            made.add_to_memory(*batch)
        return made

    def answer(self) -> list[Tensor]:
        """The value, and the gradients of embeddings, references and parameters."""
        loss, leaves = self.loss(), [self.embeddings.clone().requires_grad_()]
        call: dict[str, Any] = {"indices_tuple": self.indices}
        if self.form == "queue":
            call["enqueue_mask"] = self.entering
        elif self.miner is not None:
            others = () if self.ref_emb is None else (self.ref_emb, self.ref_labels)
            call["indices_tuple"] = MINERS[self.miner]()(self.embeddings, self.labels, *others)
        if self.ref_emb is not None:
            ref_emb = self.ref_emb.clone().requires_grad_(self.learns_references)
            leaves += [ref_emb] if self.learns_references else []
            call |= {"ref_emb": ref_emb, "ref_labels": self.ref_labels}
        value = loss(leaves[0], self.labels, **call)
        leaves += list(loss.parameters())
        if not value.requires_grad:
            return [value.detach(), *(torch.zeros_like(leaf) for leaf in leaves)]
        made = torch.autograd.grad(value, leaves, allow_unused=True)
        return [value.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, made))]

    def by(self, kind: str, bounds: Bounds | None = None) -> list[Tensor] | None:
        """The answer of an engine; None where it is one of those written on all anchors together, which are refused
        where their positives cannot be held."""
        with engine.using(kind, bounds), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that may overflow
            try:
                return self.answer()
            except ValueError as error:
                if "too many of them to hold" not in str(error):
                    raise
                return None

    def permuted(self, order: Tensor) -> "Use":
        """The same rows in another order."""
        place, indices = order.argsort(), self.indices
        tied = self.ref_labels is self.labels  # then references go along with their anchors
        if indices is not None:
            among = tied or self.form != "references"  # whether the others that they name are rows of the batch
            sides = ("anchor", "other", "other") if len(indices) == 3 else ("anchor", "other", "anchor", "other")
            indices = tuple(place[i] if among or side == "anchor" else i for i, side in zip(indices, sides))
        labels = self.labels[order]
        return replace(
            self,
            embeddings=self.embeddings[order],
            labels=labels,
            ref_emb=self.ref_emb[order] if tied and self.ref_emb is not None else self.ref_emb,
            ref_labels=labels if tied else self.ref_labels,
            indices=indices,
            entering=None if self.entering is None else self.entering[order],
        )


def allowed(name: str, of: dict[str, Callable[[], Any]]) -> list[str]:
    """The distances that a loss takes."""
    kept = []
    for each, make in of.items():
        needed = {"margin": 0.4, "Tn": 2} if name == "RankedListLoss" else {}
        try:
            getattr(losses, name)(**needed, distance=make())
        except ValueError:
            continue
        kept.append(each)
    return kept


DISTANCES_OF = {name: allowed(name, DISTANCES) for name in ARGUMENTS}


@st.composite
def labels_of(draw: st.DrawFn, size: int, generator: torch.Generator) -> Tensor:
    kind = draw(st.sampled_from(["random", "pairs", "skewed", "random", "distinct", "one class"]))
    if kind == "one class":
        return torch.zeros(size, dtype=torch.int64)
    if kind == "distinct":
        return torch.randperm(20, generator=generator)[:size] if size <= 20 else torch.arange(size) % 20
    if kind == "pairs":
        return torch.arange(size) // 2 % 20
    made = torch.randint(draw(st.integers(2, C)), (size,), generator=generator)
    return made if kind == "random" else torch.where(torch.rand(size, generator=generator) < 0.8, 0, made)


@st.composite
def rows_of(draw: st.DrawFn, size: int, dimension: int, generator: torch.Generator) -> Tensor:
    scale = draw(st.sampled_from([1.0, 0.3, 2.0]))
    return torch.randn(size, dimension, dtype=torch.float64, generator=generator) * scale


@st.composite
def listed(draw: st.DrawFn, size: int, others: int) -> tuple[Tensor, ...] | None:
    """Pairs or triplets of any rows, some of them more than once."""
    if not size or not others:
        return None
    kind = draw(st.sampled_from(["pairs", "triplets"]))
    row, other = st.integers(0, size - 1), st.integers(0, others - 1)
    if kind == "triplets":
        sides = [draw(st.lists(st.tuples(row, other, other), max_size=12))]
        width = 3
    else:
        sides = [draw(st.lists(st.tuples(row, other), max_size=12)) for _ in range(2)]
        width = 2
    return tuple(torch.tensor([each[i] for each in side], dtype=torch.int64) for side in sides for i in range(width))


@st.composite
def uses(draw: st.DrawFn) -> Use:
    name = draw(st.sampled_from(sorted(ARGUMENTS)))
    kind: type[BaseMetricLossFunction] = getattr(losses, name)
    arguments = draw(ARGUMENTS[name])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    distance = draw(st.sampled_from([None, *DISTANCES_OF[name]]))
    # a single number has no variance, and its length taken away it is 1 or -1: all distances would be equal, but for
    # roundings
    least = 1 if distance in ("not normalised", "dot") else 2
    size, dimension = draw(st.integers(6, 20) | st.integers(1, 20)), draw(st.integers(least, 6))
    use = Use(
        name,
        arguments,
        distance,
        draw(st.sampled_from([None, *REDUCERS])),
        draw(rows_of(size, dimension, generator)),
        draw(labels_of(size, generator)),
        "batch",
    )
    forms = ["batch"]
    if kind.takes_references:
        forms += ["references"] * 2 + ["queue"] * 2 * (name != "DynamicSoftMarginLoss")
    form = draw(st.sampled_from(forms))
    others = size
    if form == "references":
        tied = draw(st.booleans())  # whether reference i is anchor i
        others = size if tied else draw(st.integers(0, 30))
        use = replace(
            use,
            ref_emb=draw(rows_of(others, dimension, generator)),
            ref_labels=use.labels if tied else draw(labels_of(others, generator)),
            learns_references=draw(st.booleans()),
        )
    elif form == "queue":
        memory = draw(st.integers(size, 45))
        number = draw(st.lists(st.integers(1, min(20, memory)), max_size=4))
        earlier = [(draw(rows_of(each, dimension, generator)), draw(labels_of(each, generator))) for each in number]
        entering = torch.rand(size, generator=generator) < 0.5 if draw(st.integers(0, 4)) == 0 else None
        use = replace(use, memory=memory, earlier=tuple(earlier), entering=entering)
    use = replace(use, form=form)
    if kind.use_of_indices == "refused":
        return use
    chosen = draw(st.sampled_from(["everything", "listed", *["mined"] * (dimension > 1)]))  # miners normalise too
    if chosen == "mined":
        use = replace(use, miner=draw(st.sampled_from(sorted(MINERS))))
    elif chosen == "listed" and use.entering is None:
        # weights go by the batch's rows, whatever they are compared with
        weighs = kind.use_of_indices == "weights"
        use = replace(use, indices=draw(listed(size, min(size, others) if weighs else others)))
    return use


without_limit = st.builds(Bounds, tile=st.integers(1, 200), rows=st.integers(1, 8))


def assert_equal(found: list[Tensor], wanted: list[Tensor], rtol: float = 1e-8) -> None:
    assert len(found) == len(wanted)
    for mine, other in zip(found, wanted, strict=True):
        assert mine.isfinite().all()
        largest = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(mine, other, rtol=rtol, atol=rtol / 10 * max(1.0, largest))


def tiles_equal_the_whole(use: Use, small: Bounds) -> None:
    whole = use.by("dense")
    assert whole is not None
    found = use.by("tiled", small)
    if found is not None:
        assert_equal(found, whole)
    plain = use.by("tiled")
    assert plain is not None
    assert_equal(plain, whole)


def tile_size_changes_nothing(use: Use, one: Bounds, other: Bounds) -> None:
    first, second = use.by("tiled", one), use.by("tiled", other)
    assert first is not None
    assert second is not None
    assert_equal(first, second, rtol=1e-9)


@examples(150)
@hypothesis.given(use=uses(), small=bounds)
def test_tiles_equal_the_whole_matrix(use: Use, small: Bounds) -> None:
    tiles_equal_the_whole(use, small)


@pytest.mark.slow
@examples(600)
@hypothesis.given(use=uses(), small=bounds)
def test_tiles_equal_the_whole_matrix_in_more_uses(use: Use, small: Bounds) -> None:
    tiles_equal_the_whole(use, small)


@examples(60)
@hypothesis.given(use=uses(), one=without_limit, other=without_limit)
def test_tile_size_never_changes_a_result(use: Use, one: Bounds, other: Bounds) -> None:
    tile_size_changes_nothing(use, one, other)


@examples(60)
@hypothesis.given(use=uses().filter(lambda use: use.name not in BY_ORDER), small=without_limit, data=st.data())
def test_permuting_the_batch_permutes_the_gradient(use: Use, small: Bounds, data: st.DataObject) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(use.embeddings)))))
    kind = data.draw(st.sampled_from(["dense", "tiled"]))
    first, second = use.by(kind, small), use.permuted(order).by(kind, small)
    assert first is not None
    assert second is not None
    value, gradient, *rest = first
    if use.ref_labels is use.labels and use.learns_references:
        rest[0] = rest[0][order]
    assert_equal(second, [value, gradient[order], *rest])
