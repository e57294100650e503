"""What a batch may bring that no paper mentions: infinite distances, NaN, labels of every type, one class only."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gradbank import distances, engine, losses, reducers
from gradbank.engine import Bounds

ENGINES: dict[str, tuple[str, Bounds | None]] = {
    "dense": ("dense", None),
    "tiled": ("tiled", None),
    "small tiles": ("tiled", Bounds(tile=20, rows=4)),
}
EVERY = [
    losses.AngularLoss,
    losses.CircleLoss,
    losses.ContrastiveLoss,
    losses.FastAPLoss,
    losses.GeneralizedLiftedStructureLoss,
    losses.InstanceLoss,
    losses.IntraPairVarianceLoss,
    losses.LiftedStructureLoss,
    losses.MarginLoss,
    losses.MultiSimilarityLoss,
    losses.NCALoss,
    losses.NPairsLoss,
    losses.NTXentLoss,
    losses.PNPLoss,
    losses.SignalToNoiseRatioContrastiveLoss,
    losses.SmoothAPLoss,
    losses.SupConLoss,
    losses.TripletMarginLoss,
    losses.TupletMarginLoss,
]


def batch(size: int = 15) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 4, dtype=torch.float64, generator=generator), torch.arange(size) % 3


class Broken(distances.Distance):
    """Infinite where the numbers differ by exactly 1."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        d = (query_emb - ref_emb.T).abs()
        return torch.where(d == 1, torch.inf, d)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("options", [{}, {"smooth_loss": True}], ids=str)
def test_infinite_losses_that_do_not_count_leave_no_trace(name: str, options: dict[str, Any]) -> None:
    made: dict[str, Any] = {"distance": Broken(normalize_embeddings=False), "margin": 6.0, **options}
    rows = torch.tensor([[0.0], [1.0], [0.3], [5.0], [5.2]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1])
    mat = Broken(normalize_embeddings=False)(rows)
    kept = []
    for a in range(5):
        for p in range(5):
            for n in range(5):
                if a != p and labels[a] == labels[p] and labels[a] != labels[n]:
                    violation = float(mat[a, p] - mat[a, n]) + 6
                    kept.append(torch.nn.functional.softplus(torch.tensor(violation)) if options else max(violation, 0))
    below = [float(loss) for loss in kept if loss < 50]
    assert len(below) < len(kept)
    loss_fn = losses.TripletMarginLoss(reducer=reducers.ThresholdReducer(high=50.0), **made)
    kind, bounds = ENGINES[name]
    with engine.using(kind, bounds):
        leaf = rows.clone().requires_grad_()
        value = loss_fn(leaf, labels)
        value.backward()
    assert value.item() == pytest.approx(sum(below) / len(below), rel=1e-6)
    assert leaf.grad is not None
    assert bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
def test_a_row_of_nan_is_not_passed_over(cls: Any, name: str) -> None:
    embeddings, labels = batch()
    embeddings[2] = torch.nan
    if cls is losses.NPairsLoss:
        embeddings[:3] = torch.nan  # it takes the first rows of each class
    kind, bounds = ENGINES[name]
    with engine.using(kind, bounds):
        value = cls(reducer=reducers.MeanReducer())(embeddings, labels)
    assert not bool(value.isfinite())


@pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.float32])
def test_labels_are_only_compared(cls: Any, dtype: torch.dtype) -> None:
    embeddings, labels = batch()
    labels = labels % 2
    assert torch.equal(cls()(embeddings, labels.to(dtype)), cls()(embeddings, labels))


def test_narrow_labels_look_up_and_do_not_mask() -> None:
    embeddings, labels = batch()
    weighted = losses.ContrastiveLoss(reducer=reducers.ClassWeightedReducer(torch.rand(15, dtype=torch.float64)))
    by_class = losses.MarginLoss(num_classes=15, learn_beta=True).double()
    arc = losses.ArcFaceLoss(3, 4).double()
    for loss_fn in (weighted, by_class, arc):
        for dtype in (torch.uint8, torch.int16, torch.int32):
            assert torch.equal(loss_fn(embeddings, labels.to(dtype)), loss_fn(embeddings, labels))
    for refusing in (weighted, by_class):
        with pytest.raises(ValueError, match=r"integer labels, got torch\.float"):
            refusing(embeddings, labels.double())


@pytest.mark.parametrize("cls", [losses.TripletMarginLoss, losses.AngularLoss])
def test_one_large_class_makes_no_queries(cls: Any) -> None:
    options = {"swap": True} if cls is losses.TripletMarginLoss else {}
    rows = torch.randn(400, 4)
    assert cls(**options)(rows, torch.zeros(400)) == 0


def test_too_many_queries_are_refused_before_they_are_made() -> None:
    rows, labels = torch.randn(6000, 8), (torch.arange(6000) == 0).long()
    with pytest.raises(ValueError, match=r"a query of each positive pair, and there are up to 35988\d{3}"):
        losses.TripletMarginLoss(swap=True)(rows, labels)


class TwoDimensional(distances.Distance):
    """A user's own, that knows matrices only."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return (query_emb.unsqueeze(1) - ref_emb.unsqueeze(0)).abs().sum(-1)


@pytest.mark.parametrize("made", [TwoDimensional(), distances.BatchedDistance(distances.LpDistance(p=1))], ids=str)
@pytest.mark.parametrize("options", [{}, {"swap": True}, {"triplets_per_anchor": 2}], ids=str)
def test_any_distance_serves_any_loss(made: distances.Distance, options: dict[str, Any]) -> None:
    embeddings, labels = batch()
    ref_emb, ref_labels = batch(40)
    values = []
    for distance in (made, distances.LpDistance(p=1)):
        if made.normalize_embeddings and isinstance(made, TwoDimensional):
            distance = made if distance is made else _LikeIt()
        torch.manual_seed(0)
        values.append(
            losses.TripletMarginLoss(distance=distance, **options)(embeddings, labels, None, ref_emb, ref_labels)
        )
    torch.testing.assert_close(*values, rtol=1e-10, atol=0)


class _LikeIt(distances.LpDistance):
    """The L1 distance of rows of length 1 by the 2-norm."""

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return torch.cdist(query_emb, ref_emb, p=1)

    def pairs(self, queries: Tensor, references: Tensor) -> Tensor:
        return (queries - references).abs().sum(1)


def test_a_similarity_stays_one_in_batches() -> None:
    embeddings, labels = batch()
    batched = distances.BatchedDistance(distances.CosineSimilarity())
    values = [losses.NTXentLoss(distance=each)(embeddings, labels) for each in (batched, distances.CosineSimilarity())]
    assert torch.equal(*values)


def test_positions_to_enqueue_may_be_a_list() -> None:
    embeddings, labels = batch()
    banks = [losses.CrossBatchMemory(losses.NTXentLoss(), 4, 30).double() for _ in range(2)]
    values = [
        bank(embeddings, labels, enqueue_idx=each) for bank, each in zip(banks, ([0, 3, 4], torch.tensor([0, 3, 4])))
    ]
    assert torch.equal(*values)


@pytest.mark.parametrize("name", ["dense", "tiled"])
def test_several_vectors_come_down_at_once(name: str) -> None:
    embeddings, labels = batch()
    leaf = embeddings.requires_grad_()
    with engine.using(name):
        value = losses.NTXentLoss()(leaf, labels)
    (one,) = torch.autograd.grad(value, leaf, retain_graph=True)
    scales = torch.tensor([1.0, 2.0], dtype=torch.float64)
    (both,) = torch.autograd.grad(value, leaf, scales, is_grads_batched=True)
    torch.testing.assert_close(both, torch.stack([one, 2 * one]))
