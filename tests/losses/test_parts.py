"""Distances, reducers and regularizers by themselves, against PML and against plain arithmetic."""

import math
from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.regularizers as pml_regularizers
import torch

from gradbank import distances, losses, reducers, regularizers

PAIR_LOSSES = ("ContrastiveLoss", "MultiSimilarityLoss", "NTXentLoss", "SupConLoss", "TripletMarginLoss")
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LpDistance", {}),
    ("LpDistance", {"p": 1}),
    ("LpDistance", {"p": 3, "power": 2}),
    ("LpDistance", {"normalize_embeddings": False, "power": 0.5}),
    ("LpDistance", {"p": math.inf, "normalize_embeddings": False}),
    ("CosineSimilarity", {}),
    ("CosineSimilarity", {"power": 3}),
    ("DotProductSimilarity", {}),
    ("DotProductSimilarity", {"normalize_embeddings": False, "power": 2}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_distance_equals_that_of_pml(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ours, theirs = getattr(distances, name)(**options), getattr(pml_distances, name)(**options)
    embeddings, ref_emb = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    for arguments in ((embeddings,), (embeddings, ref_emb)):
        torch.testing.assert_close(ours(*arguments), theirs(*arguments), rtol=1e-12, atol=1e-12)
    assert ours.is_inverted == theirs.is_inverted
    assert ours.margin(1.0, 3.0) == theirs.margin(1.0, 3.0)
    paired = ours.pairs(ours.prepare(embeddings), ours.prepare(ref_emb[:6]))
    torch.testing.assert_close(paired, ours(embeddings, ref_emb[:6]).diagonal(), rtol=1e-12, atol=1e-12)


NORMS = [f"{when}_avg_{which}_norm" for when in ("initial", "final") for which in ("query", "ref")]


@pytest.mark.parametrize(("name", "options"), [*OPTIONS, ("SNRDistance", {})])
def test_distance_writes_the_mean_norms_that_pml_does(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = [getattr(library, name)(**options, collect_stats=True) for library in (distances, pml_distances)]
    ours, theirs = made
    assert [getattr(ours, norm) for norm in NORMS] == [0, 0, 0, 0]
    embeddings, ref_emb = torch.randn(6, 4, dtype=torch.float64), 3 * torch.randn(9, 4, dtype=torch.float64)
    for arguments in ((embeddings, ref_emb), (embeddings,)):
        for distance in made:
            distance(*arguments)
        for norm in NORMS:
            assert type(getattr(ours, norm)) is float
            assert getattr(ours, norm) == pytest.approx(getattr(theirs, norm), rel=1e-12)
    quiet = getattr(distances, name)(**options)
    quiet(embeddings)
    assert [getattr(quiet, norm) for norm in NORMS] == [None] * 4


def test_norms_are_of_all_rows_however_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    embeddings, ref_emb = torch.randn(7, 4), torch.randn(9, 4)
    whole, pieces = (distances.LpDistance(collect_stats=True, p=1) for _ in range(2))
    whole(embeddings, ref_emb)
    monkeypatch.setattr("gradbank.distances.base._NUMBERS_AT_ONCE", 8)
    pieces.record(embeddings, (ref_emb[:5], ref_emb[5:]))
    batched = distances.BatchedDistance(distances.LpDistance(collect_stats=True, p=1), lambda *_: None, batch_size=2)
    batched(embeddings, ref_emb)  # PML's has those of the last batch
    for norm in NORMS:
        assert getattr(whole, norm) == pytest.approx(getattr(pieces, norm), rel=1e-12)
        assert getattr(whole, norm) == getattr(batched, norm) == getattr(batched.distance, norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_of_what_a_distance_of_ones_own_prepares(dtype: torch.dtype) -> None:
    class Weighted(distances.LpDistance):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.weights = torch.nn.Parameter(torch.tensor([2.0, 0.0]))

        def prepare(self, embeddings: torch.Tensor) -> torch.Tensor:
            return super().prepare(embeddings) @ self.weights.diag()

    distance = Weighted(collect_stats=True)
    loss = losses.ContrastiveLoss(distance=distance)
    loss(torch.tensor([[3, 4], [8, 6]], dtype=dtype), torch.tensor([0, 1]))
    assert distance.initial_avg_query_norm == distance.initial_avg_ref_norm == 7.5
    assert distance.final_avg_query_norm == pytest.approx((1.2 + 1.6) / 2)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4,), (4, 3)), r"embeddings must be \(rows, dimension\)"),
        (((4, 3), (4, 2)), "the same dimension, got 3 and 2"),
    ],
)
def test_distance_refuses_shapes_that_do_not_fit(shapes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distances.LpDistance()(*(torch.ones(shape) for shape in shapes))


def listed(values: torch.Tensor) -> Any:
    return {"loss": {"losses": values, "indices": torch.arange(len(values)), "reduction_type": "element"}}


@pytest.mark.parametrize(
    ("reducer", "wanted"),
    [
        (reducers.MeanReducer(), (-1 + 0 + 0.5 + 0.5 + 2) / 5),
        (reducers.AvgNonZeroReducer(), (0.5 + 0.5 + 2) / 3),
        (reducers.ThresholdReducer(low=0.5), 2),
        (reducers.ThresholdReducer(high=0.5), (-1 + 0) / 2),
        (reducers.ThresholdReducer(low=-1, high=2), (0 + 0.5 + 0.5) / 3),
        (reducers.ThresholdReducer(3), 0),
    ],
    ids=str,
)
def test_reducer_is_a_mean_of_what_lies_strictly_between(reducer: reducers.Reducer, wanted: float) -> None:
    values = torch.tensor([-1, 0, 0.5, 0.5, 2], dtype=torch.float64, requires_grad=True)
    value = reducer(listed(values), values, None)
    assert float(value.detach()) == pytest.approx(wanted, abs=1e-15)
    value.backward()
    assert values.grad is not None
    low, high = reducer.bounds
    counted = (values > (-math.inf if low is None else low)) & (values < (math.inf if high is None else high))
    assert torch.equal(values.grad, counted.double() / max(int(counted.sum()), 1))


def test_infinite_loss_that_does_not_count_leaves_no_trace() -> None:
    values = torch.tensor([1.0, math.inf], requires_grad=True)
    value = reducers.ThresholdReducer(high=2)(listed(values), values, None)
    value.backward()
    assert value == 1
    assert values.grad is not None
    assert values.grad.tolist() == [1, 0]


def test_threshold_needs_a_bound() -> None:
    with pytest.raises(ValueError, match="at least one of low and high"):
        reducers.ThresholdReducer()


@pytest.mark.parametrize("options", [{}, {"p": 1}, {"power": 2}, {"p": 3, "power": 0.5}])
@pytest.mark.parametrize("loss", ["NTXentLoss", "ContrastiveLoss", "TripletMarginLoss", "SupConLoss"])
def test_regularizer_is_added_to_the_loss(loss: str, options: dict[str, float]) -> None:
    torch.manual_seed(0)
    batch = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    gradients = []
    for library, made in ((losses, regularizers), (pml_losses, pml_regularizers)):
        regularized = getattr(library, loss)(
            embedding_regularizer=made.LpRegularizer(**options), embedding_reg_weight=0.25
        )
        leaf = batch[0].clone().requires_grad_()
        value = regularized(leaf, batch[1])
        value.backward()
        gradients.append((value.detach(), leaf.grad))
        assert not torch.isclose(value, getattr(library, loss)()(*batch))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"embeddings": torch.ones(4, 3), "labels": torch.ones(3)}, r"labels must be \(4,\)"),
        ({"embeddings": torch.ones(4, 3), "labels": torch.ones(4, 1)}, r"labels must be \(4,\)"),
        ({"embeddings": torch.ones(4), "labels": torch.ones(4)}, r"must be \(batch, dimension\)"),
        ({"embeddings": torch.ones(4, 3)}, "needs labels, or an indices_tuple"),
        ({"embeddings": torch.ones(4, 3).int(), "labels": torch.ones(4)}, "floating point, got torch.int32"),
        (
            {"embeddings": torch.ones(4, 3), "labels": torch.ones(4), "ref_emb": torch.ones(5, 2)},
            "the same dimension, got 3 and 2",
        ),
        (
            {
                "embeddings": torch.ones(4, 3),
                "labels": torch.ones(4),
                "ref_emb": torch.ones(5, 3),
                "ref_labels": torch.ones(4),
            },
            r"ref_labels must be \(5,\)",
        ),
        ({"embeddings": torch.ones(4, 3), "labels": torch.ones(4), "ref_emb": torch.ones(5, 3)}, r"must be \(5,\)"),
    ],
)
@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_call_that_does_not_fit_is_refused(loss: str, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(losses, loss)()(**call)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"labels": torch.tensor([0, 3])}, r"labels must be in 0..2 \(num_classes=3\), got 0..3"),
        ({"labels": torch.tensor([-1, 2])}, "got -1..2"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels must be integers"),
        ({}, "ArcFaceLoss needs labels"),
        ({"labels": torch.tensor([0, 1]), "ref_emb": torch.ones(2, 4)}, "takes no ref_emb"),
        ({"embeddings": torch.ones(2, 5), "labels": torch.tensor([0, 1])}, "dimension 5, .* embedding_size=4"),
    ],
)
def test_classification_that_does_not_fit_is_refused(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.ArcFaceLoss(3, 4)(**({"embeddings": torch.ones(2, 4)} | call))
