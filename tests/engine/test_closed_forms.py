"""Gradients that distances and functions give by themselves, held to autograd; and who must not use them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gradbank import distances, engine, losses, miners
from gradbank.engine import Bounds, Each, Limits, Linear, LogSumExp, MinedPairs, Ramp, Sloped

HERE = torch.empty(0).device  # as --device has it
KNOWN: list[distances.Distance] = [
    distances.LpDistance(),
    distances.LpDistance(power=2),
    distances.LpDistance(normalize_embeddings=False),
    distances.CosineSimilarity(),
    distances.DotProductSimilarity(normalize_embeddings=False),
    distances.SNRDistance(),
]


def rows(seed: int, number: int) -> Tensor:
    return torch.randn(number, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("distance", KNOWN, ids=str)
@pytest.mark.parametrize("number", [5, 40])  # below 26 rows, differences are taken one by one
def test_a_distance_pulls_as_autograd_does(distance: distances.Distance, number: int) -> None:
    assert distance.knows_pull
    queries, references = (distance.prepare(rows(seed, n)).requires_grad_() for seed, n in ((0, 7), (1, number)))
    s = distance.matrix(queries, references)
    weight = torch.rand_like(s)
    wanted = torch.autograd.grad(s, [queries, references], weight)
    with torch.no_grad():
        pulled = distance.pull(queries, references, s.detach(), weight.clone(), of_both=True)
        assert distance.pull(queries, references, s.detach(), weight.clone())[1] is None
    for a, b in zip(pulled, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("distance", KNOWN, ids=str)
@pytest.mark.parametrize("piece_dtype", [torch.float64, torch.float16], ids=str)
def test_a_distance_pulls_listed_pairs_as_autograd_does(distance: distances.Distance, piece_dtype: torch.dtype) -> None:
    pieces = tuple(rows(seed, n).to(piece_dtype) for seed, n in ((1, 30), (2, 1), (3, 40)))
    references = engine.References(pieces)
    queries = distance.prepare(rows(0, 7)).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    anchor, other = (torch.randint(n, (50,), generator=generator) for n in (5, 30))
    other[25:] += 41  # none in the second piece
    near, inverse, _ = references.prepared(distance, slice(0, 71), torch.float64)
    s = distance.matrix(queries, near)[anchor, other]
    weight = torch.rand_like(s)
    (wanted,) = torch.autograd.grad(s, queries, weight)

    def sums(each: Tensor) -> Tensor:
        return references.sums(other, anchor, each if inverse is None else each * inverse[other, 0], 7)

    with torch.no_grad():
        pulled = distance.pull_of_pairs(queries, anchor, s.detach(), weight, sums)
    torch.testing.assert_close(pulled, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distance", KNOWN, ids=str)
@pytest.mark.parametrize("cast_to", [None, torch.bfloat16], ids=str)
def test_known_lengths_change_no_distance(distance: distances.Distance, cast_to: torch.dtype | None) -> None:
    """Lengths that a queue keeps, and a row of zeros, which has no direction."""
    others = rows(1, 40)
    others[3] = 0
    references = engine.References((others,), squares=(others.square().sum(1),))
    queries = distance.prepare(rows(0, 30))
    wanted = distance.matrix(queries, distance.prepare(others))
    with torch.no_grad(), torch.autocast(HERE.type, cast_to, enabled=cast_to is not None):
        near, _, squares = references.prepared(distance, slice(0, 40), torch.float64)
        torch.testing.assert_close(distance.tile(queries, near, squares), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("distance", KNOWN, ids=str)
def test_entries_lie_between_the_bounds_of_their_distance(distance: distances.Distance) -> None:
    queries = rows(0, 30)
    s = distance(queries, torch.cat([queries, -queries, torch.zeros(1, 6, dtype=torch.float64)]))
    if distance.bounds is not None:
        least, most = distance.bounds
        assert float(s.min()) == pytest.approx(least, abs=1e-6)
        assert float(s.max()) == pytest.approx(most, abs=1e-6)
    else:
        assert not distance.normalize_embeddings or isinstance(distance, distances.SNRDistance)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.bool], ids=str)
def test_positives_are_those_of_equal_labels_whatever_holds_them(dtype: torch.dtype) -> None:
    whole = [0, 1, 1, 7, 250, 3, 0] if dtype != torch.bool else [0, 1, 1, 0]
    extreme = [2**63 - 1, -(2**63), 2**62] if dtype == torch.int64 else []
    labels, ref_labels = torch.tensor(whole).to(dtype), torch.tensor([*whole, *whole, *extreme]).to(dtype)
    for few in (labels, labels[1:2], labels[:0]):
        pairs = engine.LabelledPairs(few, ref_labels)
        listing = pairs.listing(slice(0, len(few)), torch.tensor([0, len(ref_labels)]))
        assert listing is not None
        wanted = (few[:, None] == ref_labels).nonzero()
        assert {*zip(listing.row.tolist(), listing.column.tolist())} == {*map(tuple, wanted.tolist())}


@pytest.mark.parametrize("engine_name", ["dense", "tiled"])
def test_a_float_label_between_two_integers_is_neither(engine_name: str) -> None:
    embeddings, others = rows(0, 12), rows(1, 60)
    labels, ref_labels = torch.arange(12) // 2, torch.arange(60) / 8
    with engine.using(engine_name, Bounds(tile=64, rows=4)):
        found = losses.ContrastiveLoss()(embeddings, labels, ref_emb=others, ref_labels=ref_labels)
        wanted = losses.ContrastiveLoss()(embeddings, labels.double(), ref_emb=others, ref_labels=ref_labels)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


class Lifted(distances.Distance):
    """A user's own, which compares embeddings with one number more."""

    def prepare(self, embeddings: Tensor) -> Tensor:
        return torch.cat([embeddings, embeddings.square().sum(1, keepdim=True)], 1)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return (query_emb[:, None] - ref_emb).abs().sum(2)


@pytest.mark.parametrize("loss", [losses.ContrastiveLoss, losses.NTXentLoss, losses.TripletMarginLoss], ids=str)
def test_a_distance_may_compare_in_another_dimension(loss: Any) -> None:
    made = []
    for name, bounds in (("dense", None), ("tiled", Bounds(tile=100, rows=5))):
        leaf, others = rows(3, 20).requires_grad_(), rows(4, 30).requires_grad_()
        with engine.using(name, bounds):
            value = loss(distance=Lifted())(leaf, torch.arange(20) % 4, ref_emb=others, ref_labels=torch.arange(30) % 4)
        made.append((value.detach(), *torch.autograd.grad(value, [leaf, others])))
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_an_embedding_at_distance_0_has_no_pull() -> None:
    distance = distances.LpDistance()
    queries = distance.prepare(rows(0, 30))
    s = distance.matrix(queries, queries)
    s.fill_diagonal_(0)
    of_queries, _ = distance.pull(queries, queries, s, torch.eye(30, dtype=s.dtype))
    assert bool((of_queries == 0).all())


class Halved(distances.CosineSimilarity):
    """A user's own, on the back of one that knows its gradient."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return (query_emb @ ref_emb.T).tanh() / 2

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        return self.raised((queries * references).sum(1).tanh() / 2)


@pytest.mark.parametrize("loss", [losses.NTXentLoss, losses.IntraPairVarianceLoss, losses.ContrastiveLoss], ids=str)
def test_a_distance_that_computes_its_matrix_itself_is_differentiated_as_it_does(loss: Any) -> None:
    assert not Halved().knows_pull
    assert not Halved().is_product
    made = []
    for name, bounds in (("dense", None), ("tiled", Bounds(tile=40, rows=4))):
        with engine.using(name, bounds):
            bank = losses.CrossBatchMemory(loss(distance=Halved()), 6, memory_size=30).double()
            bank.add_to_memory(rows(2, 30), torch.arange(30) % 4)
            leaf = rows(3, 8).requires_grad_()
            value = bank(leaf, torch.arange(8) % 4)
            made.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("slope", [1.0, -2.5])
def test_a_ramp_is_its_formula(power: int, slope: float) -> None:
    s, row = rows(4, 5).requires_grad_(), rows(5, 5)[:, :1].requires_grad_()
    made = Ramp(slope, 0.3, -1.5, power)(s, row)
    plain = (slope * s - 1.5 * row + 0.3).clamp(min=0) ** power
    torch.testing.assert_close(made, plain)
    for a, b in zip(torch.autograd.grad(made.sum(), [s, row]), torch.autograd.grad(plain.sum(), [s, row]), strict=True):
        torch.testing.assert_close(a, b)


class Declared(losses.PairLoss):
    """A loss of one statistic, with a function that is given in two ways."""

    def __init__(self, statistic: Any) -> None:
        super().__init__()
        self.statistic = statistic
        self.distance = distances.CosineSimilarity()

    def negatives(self, anchors: engine.Anchors) -> Any:
        return {"near": self.statistic()}

    def terms(self, anchors: engine.Anchors) -> Any:
        if isinstance(self.statistic(), Each):
            return {"near": anchors.per_negative("near")}
        return {"near": anchors.per_anchor(anchors.found["near"].value)}


@pytest.mark.parametrize(
    ("known", "plain"),
    [
        (lambda: Each(Ramp(2.0, -0.1)), lambda: Each(lambda s: (2 * s - 0.1).relu())),
        (lambda: Each(Ramp(-1.0, 0.4, power=2)), lambda: Each(lambda s: (0.4 - s).relu() ** 2)),
        (lambda: LogSumExp(Sloped(lambda s: (s**3, 3 * s**2))), lambda: LogSumExp(lambda s: s**3)),
        (lambda: LogSumExp(Linear(9.0, 0.5)), lambda: LogSumExp(lambda s: 9 * s + 0.5)),
        (lambda: LogSumExp(Linear(-9.0)), lambda: LogSumExp(lambda s: -9 * s)),
        (lambda: LogSumExp(Linear(4000.0)), lambda: LogSumExp(lambda s: 4000 * s)),
    ],
    ids=["ramp", "squared ramp", "sloped", "near together", "falling", "far apart"],
)
@pytest.mark.parametrize("form", ["batch", "references", "bank"])
@pytest.mark.parametrize("reducer", ["MeanReducer", "AvgNonZeroReducer", "ThresholdReducer"])
def test_a_function_with_a_derivative_is_the_one_without(known: Any, plain: Any, form: str, reducer: str) -> None:
    from gradbank import reducers

    made = []
    for statistic in (known, plain):
        loss = Declared(statistic)
        loss.reducer = getattr(reducers, reducer)(**({"low": 0.05} if reducer == "ThresholdReducer" else {}))
        leaf, others = rows(6, 12).requires_grad_(), rows(7, 25).requires_grad_()
        labels = torch.arange(12) % 4
        with engine.using("tiled", Bounds(tile=60, rows=5)):
            if form == "bank":
                bank = losses.CrossBatchMemory(loss, 6, memory_size=25).double()
                bank.add_to_memory(others.detach(), torch.arange(25) % 4)
                value = bank(leaf, labels)
            elif form == "references":
                value = loss(leaf, labels, ref_emb=others, ref_labels=torch.arange(25) % 4)
            else:
                value = loss(leaf, labels)
        wanted = [leaf, others] if form == "references" else [leaf]
        made.append([value.detach(), *torch.autograd.grad(value, wanted)])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distance", [distances.CosineSimilarity(), distances.LpDistance()], ids=str)
def test_mined_pairs_are_the_same_listed_as_masked(distance: distances.Distance) -> None:
    embeddings, others = rows(8, 20), rows(9, 90)
    labels, ref_labels = torch.arange(20) % 10, torch.arange(90) % 30
    queries = distance.prepare(embeddings)
    generator = torch.Generator().manual_seed(0)
    far, near = (torch.randn(20, dtype=torch.float64, generator=generator) / 3 for _ in range(2))
    if not distance.is_inverted:
        far, near = far - 1.4, near - 1.4
    references = engine.References((others,), ref_labels)
    pairs = MinedPairs(engine.LabelledPairs(labels, ref_labels), distance, queries, references, Limits(far, near, 0.05))
    block, columns = slice(4, 15), slice(0, 90)
    tile = pairs.tile(block, columns)
    listing = pairs.listing(block, torch.tensor([0, 90]))
    weight = pairs.weight(block, columns)
    assert listing is not None
    assert weight is not None
    positives, holes = listing.tile(0)
    assert 0 < len(positives) < len(holes.flat)
    assert set(positives.tolist()) == set(tile.positives.tolist())
    negatives = weight.view(-1).index_fill(0, holes.flat, 0).view(weight.shape)
    assert 0 < int(negatives.sum()) < negatives.numel() - len(holes.flat)
    assert torch.equal(negatives, tile.negatives.to(negatives.dtype))


@pytest.mark.parametrize("miner", [miners.MultiSimilarityMiner(), miners.PairMarginMiner()], ids=str)
def test_a_queue_is_mined_by_limits_and_in_one_sweep(miner: Any) -> None:
    references = engine.References((rows(9, 400),), torch.arange(400) % 100)
    pairs = miner.select(rows(8, 20), references, engine.LabelledPairs(torch.arange(20) % 100, references.labels))
    assert isinstance(pairs, MinedPairs)
    assert pairs.listing(slice(0, 20), torch.tensor([0, 400])) is not None  # else a gradient takes a second sweep


class Expanded(distances.Distance):
    """A user's own, whose matrix and whose gradient share numbers between entries."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return (query_emb.sum(1)[:, None] * ref_emb.sum(1)).abs()


class Turned(distances.Distance):
    """A user's own, whose matrix lies by columns."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return torch.cdist(ref_emb, query_emb).T


@pytest.mark.parametrize("distance", [Expanded(), Turned()], ids=["Expanded", "Turned"])
@pytest.mark.parametrize(
    "loss", [losses.ContrastiveLoss, losses.NTXentLoss, losses.TripletMarginLoss, losses.MarginLoss], ids=str
)
@pytest.mark.parametrize("form", ["batch", "bank"])
def test_a_matrix_may_lie_in_memory_as_it_likes(distance: distances.Distance, loss: Any, form: str) -> None:
    made = []
    for name, bounds in (("dense", None), ("tiled", Bounds(tile=40, rows=4))):
        with engine.using(name, bounds):
            loss_fn = loss(distance=distance).double()
            leaf = rows(10, 12).requires_grad_()
            if form == "bank":
                loss_fn = losses.CrossBatchMemory(loss_fn, 6, memory_size=30)
                loss_fn.add_to_memory(rows(11, 30), torch.arange(30) % 4)
            value = loss_fn(leaf, torch.arange(12) % 4)
            made.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_flat_logit_has_no_gradient() -> None:
    leaf = rows(12, 12).requires_grad_()
    with engine.using("tiled"):
        losses.NCALoss(softmax_scale=0.0)(leaf, torch.arange(12) % 4).backward()
    assert leaf.grad is not None
    assert bool((leaf.grad == 0).all())


def test_a_gradient_of_nan_is_not_hidden_by_rows_that_coincide() -> None:
    distance = distances.LpDistance(normalize_embeddings=False)
    queries = rows(13, 30)
    s = distance.matrix(queries, queries).fill_diagonal_(0)
    weight = torch.ones_like(s)
    weight[0, 1] = torch.nan
    of_queries, _ = distance.pull(queries, queries, s, weight)
    assert bool(of_queries[0].isnan().all())
    assert bool(of_queries[1:].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_share_is_its_exponential_or_next_to_nothing_and_never_subnormal(dtype: torch.dtype) -> None:
    from gradbank.engine.logsumexp import _exp_

    tiny = torch.finfo(dtype).tiny
    x = torch.linspace(-1.2, 0, 4000, dtype=dtype) * -math.log(tiny)
    plain, made = x.exp(), _exp_(x.clone())
    assert bool(((plain > 0) & (plain < tiny)).any())
    least = float(made.min())
    assert tiny**0.75 < least < torch.finfo(dtype).eps ** 3
    assert torch.equal(made, plain.clamp(min=least))
    assert bool(_exp_(torch.tensor([torch.nan], dtype=dtype)).isnan())


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [torch.inf, torch.inf, 1.0]])
def test_what_a_miner_leaves_out_may_be_infinite(values: list[float]) -> None:
    from gradbank.engine.negatives import Masked, Weighted

    weight = torch.tensor([[1.0, 0.0, 1.0]])
    for method in ("logged", "zeroed", "beyond"):
        made = [getattr(each, method)(torch.tensor([values])) for each in (Weighted(weight), Masked(weight > 0))]
        assert torch.equal(*made)
