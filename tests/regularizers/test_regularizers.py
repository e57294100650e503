"""Regularizers: PML's values and gradients, in bounded memory."""

import math
from typing import Any

import pytest
import torch
from pytorch_metric_learning import distances as pml_distances
from pytorch_metric_learning import reducers as pml_reducers
from pytorch_metric_learning import regularizers as pml_regularizers
from torch import Tensor, nn

from gradbank import distances, reducers, regularizers

CLASSES, CENTERS = 7, 4  # of SparseCentersRegularizer; all others take as many rows

CASES = [
    ("LpRegularizer", {}),
    ("LpRegularizer", {"p": 1, "power": 2}),
    ("ZeroMeanRegularizer", {}),
    ("CenterInvariantRegularizer", {}),
    ("RegularFaceRegularizer", {}),
    ("SparseCentersRegularizer", {"num_classes": CLASSES, "centers_per_class": CENTERS}),
]
REDUCERS = [
    ("MeanReducer", {}),
    ("AvgNonZeroReducer", {}),
    ("ThresholdReducer", {"low": 0.3, "high": 0.9}),
]


def value_and_gradient(cost: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor]:
    leaf = rows.clone().requires_grad_()
    value = cost(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def agree(ours: nn.Module, theirs: nn.Module, rows: Tensor) -> None:
    found, wanted = value_and_gradient(ours, rows), value_and_gradient(theirs, rows)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("name", "arguments"), CASES)
@pytest.mark.parametrize(("reducer", "bounds"), [(None, {}), *REDUCERS])
def test_regularizers_equal_pml(name: str, arguments: Any, reducer: str | None, bounds: Any, rows: Any) -> None:
    made = []
    for kinds, reducing in ((regularizers, reducers), (pml_regularizers, pml_reducers)):
        given = {} if reducer is None else {"reducer": getattr(reducing, reducer)(**bounds)}
        made.append(getattr(kinds, name)(**arguments, **given))
    agree(*made, rows(CLASSES * CENTERS))


@pytest.mark.parametrize(
    ("name", "distance", "options"),
    [
        ("CenterInvariantRegularizer", "LpDistance", {"normalize_embeddings": False, "p": 1}),
        ("RegularFaceRegularizer", "DotProductSimilarity", {"normalize_embeddings": False}),
        ("RegularFaceRegularizer", "CosineSimilarity", {"power": 3}),
    ],
)
def test_regularizers_equal_pml_with_another_distance(name: str, distance: str, options: Any, rows: Any) -> None:
    ours = getattr(regularizers, name)(distance=getattr(distances, distance)(**options))
    agree(ours, getattr(pml_regularizers, name)(distance=getattr(pml_distances, distance)(**options)), rows(9))


def test_a_class_weight_goes_by_row(rows: Any) -> None:
    weights = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = regularizers.ZeroMeanRegularizer(reducer=reducers.ClassWeightedReducer(weights))
    theirs = pml_regularizers.ZeroMeanRegularizer(reducer=pml_reducers.ClassWeightedReducer(weights))
    agree(ours, theirs, rows(6))


@pytest.mark.parametrize("number", [2, 16, 37])
def test_closest_rows_are_the_same_however_they_are_tiled(
    number: int, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regularizers, "TILE", 16)  # tiles of 4 x 4, the last ones cut
    agree(regularizers.RegularFaceRegularizer(), pml_regularizers.RegularFaceRegularizer(), rows(number))


def test_no_matrix_of_all_rows_is_held(rows: Any, largest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regularizers, "TILE", 64)
    weights = rows(300, 4)
    for cost in (regularizers.RegularFaceRegularizer(), regularizers.SparseCentersRegularizer(100, 3)):
        with largest() as seen:
            value_and_gradient(cost, weights)
        assert seen.entries <= weights.numel()


def test_a_lone_row_is_its_own_neighbour_as_in_pml(rows: Any) -> None:
    agree(regularizers.RegularFaceRegularizer(), pml_regularizers.RegularFaceRegularizer(), rows(1))


def test_centers_that_coincide_cost_nothing_and_get_no_gradient() -> None:
    """PML's root has an infinite derivative there, and its gradient is NaN."""
    weights = torch.tensor([[3.0, 4.0], [6.0, 8.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    value, gradient = value_and_gradient(regularizers.SparseCentersRegularizer(2, 2), weights)
    assert float(value) == pytest.approx(math.sqrt(2) / 4)
    assert bool((gradient[:2] == 0).all())
    assert bool(gradient.isfinite().all())
    assert bool(gradient[2:].any())
    assert bool(value_and_gradient(pml_regularizers.SparseCentersRegularizer(2, 2), weights)[1].isnan().any())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: regularizers.CenterInvariantRegularizer(distance=distances.LpDistance()),
            "normalize_embeddings=False",
        ),
        (lambda: regularizers.CenterInvariantRegularizer(distance=distances.CosineSimilarity()), "compares norms"),
        (lambda: regularizers.RegularFaceRegularizer(distance=distances.LpDistance()), "wants a similarity"),
        (lambda: regularizers.SparseCentersRegularizer(3, 1), "centers_per_class > 1, got .*=1"),
        (lambda: regularizers.SparseCentersRegularizer(3, 2, distance=distances.LpDistance()), "CosineSimilarity"),
        (lambda: regularizers.SparseCentersRegularizer(3, 2)(torch.ones(5, 2)), "wants 6 rows, .* got 5"),
        (lambda: regularizers.ZeroMeanRegularizer()(torch.ones(5)), r"must be \(batch, dimension\), got shape \(5,\)"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_pml_asserts_what_is_refused() -> None:
    with pytest.raises(AssertionError):
        regularizers.SparseCentersRegularizer(3, 1)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_half_precision_is_computed_in_float32(name: str, arguments: Any, rows: Any) -> None:
    half = rows(CLASSES * CENTERS).half()
    cost = getattr(regularizers, name)(**arguments)
    value, gradient = value_and_gradient(cost, half)
    wanted, wide = value_and_gradient(cost, half.float())
    assert torch.equal(value, wanted)
    assert gradient.dtype == torch.float16
    assert torch.equal(gradient, wide.half())


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_regularizers_are_built_again_from_their_arguments(name: str, arguments: Any, rows: Any) -> None:
    cost = getattr(regularizers, name)(**arguments, reducer=reducers.AvgNonZeroReducer())
    copy = cost.rebuilt()
    assert copy.spec() == cost.spec()
    assert torch.equal(copy(rows(CLASSES * CENTERS)), cost(rows(CLASSES * CENTERS)))


def test_a_regularizer_written_for_pml_works(rows: Any) -> None:
    class Longest:
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.scale = 2

        def compute_loss(self, x: Tensor) -> Any:
            return {
                "loss": {
                    "losses": self.scale * x.norm(dim=1),
                    "indices": torch.arange(len(x)),
                    "reduction_type": "element",
                }
            }

    ours = type("Ours", (Longest, regularizers.BaseRegularizer), {})
    theirs = type("Theirs", (Longest, pml_regularizers.BaseRegularizer), {})
    agree(
        ours(reducer=reducers.ThresholdReducer(low=3)), theirs(reducer=pml_reducers.ThresholdReducer(low=3)), rows(12)
    )


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_distance_and_reducer_write_what_they_do_for_pml(name: str, arguments: Any, rows: Any) -> None:
    made = []
    for kinds, measuring, reducing in (
        (regularizers, distances, reducers),
        (pml_regularizers, pml_distances, pml_reducers),
    ):
        default = getattr(regularizers, name)(**arguments).distance
        options = {} if default.is_inverted else {"normalize_embeddings": default.normalize_embeddings}
        distance = getattr(measuring, type(default).__name__)(collect_stats=True, **options)
        reducer = reducing.ThresholdReducer(low=0.3, collect_stats=True)
        made.append(getattr(kinds, name)(**arguments, distance=distance, reducer=reducer))
        made[-1](rows(CLASSES * CENTERS))
    ours, theirs = made
    for part in ("distance", "reducer"):
        for each in getattr(theirs, part)._record_these_stats:
            assert getattr(getattr(ours, part), each) == pytest.approx(getattr(getattr(theirs, part), each))
    assert ours.reducer.losses_size > 0


def test_sparse_centers_tell_how_alike_centers_are(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regularizers, "TILE", 16)
    weights = rows(CLASSES * CENTERS)
    for power in (1, 2):
        ours, theirs = (
            kinds.SparseCentersRegularizer(
                CLASSES, CENTERS, distance=distancing.CosineSimilarity(power=power), collect_stats=True
            )
            for kinds, distancing in ((regularizers, distances), (pml_regularizers, pml_distances))
        )
        assert float(ours(weights)) == pytest.approx(float(theirs(weights)))
        assert ours.same_class_center_sim == pytest.approx(theirs.same_class_center_sim)
        assert ours.diff_class_center_sim == pytest.approx(theirs.diff_class_center_sim)
