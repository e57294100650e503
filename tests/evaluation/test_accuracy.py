"""AccuracyCalculator: the same values as PML, in less memory, and what it refuses."""

import logging
import sys
from collections.abc import Callable
from math import isnan
from typing import Any

import numpy as np
import pytest
import pytorch_metric_learning.distances as pml_distances
import torch
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator as PMLCalculator
from pytorch_metric_learning.utils.inference import CustomKNN as PMLKNN
from torch import Tensor

from gradbank.evaluation import AccuracyCalculator, ExactKNN, KMeans, neighbors, precision_at_k

RETRIEVAL = (
    "mean_average_precision",
    "mean_average_precision_at_r",
    "mean_reciprocal_rank",
    "precision_at_1",
    "r_precision",
)
CLUSTERS = ("NMI", "AMI")


def parity(x: Tensor, number: int) -> Tensor:
    """Clusters that need no search."""
    return (x.sum(1) * 10).long() % number


def pml(**arguments: Any) -> Any:
    """PML's calculator without faiss."""
    knn = PMLKNN(pml_distances.LpDistance(normalize_embeddings=False, power=2))
    return PMLCalculator(knn_func=knn, kmeans_func=parity, device=torch.device("cpu"), **arguments)


def ours(**arguments: Any) -> AccuracyCalculator:
    return AccuracyCalculator(**{"knn_func": ExactKNN(), "kmeans_func": parity, "device": "cpu", **arguments})


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        # PML has reciprocal ranks in float32
        tolerance = 1e-6 if name == "mean_reciprocal_rank" else 1e-12
        assert found[name] == pytest.approx(value, rel=tolerance, nan_ok=True), name


def task(kind: str, classes: int) -> tuple[Any, ...]:
    torch.manual_seed(classes)
    x, labels = torch.randn(60, 6), torch.randint(classes, (60,))
    y, known = torch.randn(80, 6), torch.randint(classes, (80,))
    every = torch.cat([x, y]), torch.cat([labels, known]), True
    return {"alone": (x, labels), "apart": (x, labels, y, known), "within": (x, labels, *every)}[kind]


@pytest.mark.parametrize("averaging", ["queries", "avg_of_avgs", "return_per_class"])
@pytest.mark.parametrize("k", [None, 5, "max_bin_count"])
@pytest.mark.parametrize("kind", ["alone", "apart", "within"])
def test_values_are_those_of_pml(averaging: str, k: Any, kind: str) -> None:
    arguments: dict[str, Any] = {"k": k} | ({} if averaging == "queries" else {averaging: True})
    for classes in (3, 70):  # with 70, some queries are alone
        given = task(kind, classes)
        assert_equal(ours(**arguments).get_accuracy(*given), pml(**arguments).get_accuracy(*given))


def test_digits_score_as_in_pml(digits: tuple[Tensor, Tensor]) -> None:
    """Their distances are integers, many of which tie: both go by the same neighbours."""
    found = ours(kmeans_func=KMeans()).get_accuracy(*digits)
    calculator = PMLCalculator(knn_func=ExactKNN(), kmeans_func=KMeans(), device=torch.device("cpu"))
    assert_equal(found, calculator.get_accuracy(*digits))
    assert found["NMI"] > found["AMI"] > 0.6
    assert found["precision_at_1"] > 0.97
    assert 0.3 < found["mean_average_precision_at_r"] < found["r_precision"] < 0.9


def test_scores_are_those_of_their_definition() -> None:
    given = task("within", 5)
    x, labels, y, known, _ = (each.tolist() if isinstance(each, Tensor) else each for each in given)
    totals = dict.fromkeys(RETRIEVAL, 0.0)
    for i, row in enumerate(x):
        apart = [(sum((a - b) ** 2 for a, b in zip(row, other)), j) for j, other in enumerate(y) if j != i]
        hits = [known[j] == labels[i] for _, j in sorted(apart)]
        r = sum(hits)
        precision = [sum(hits[: n + 1]) / (n + 1) if hit else 0.0 for n, hit in enumerate(hits)]
        totals["precision_at_1"] += hits[0]
        totals["r_precision"] += sum(hits[:r]) / r
        totals["mean_average_precision_at_r"] += sum(precision[:r]) / r
        totals["mean_average_precision"] += sum(precision) / r
        totals["mean_reciprocal_rank"] += 1 / (hits.index(True) + 1)
    found = ours(exclude=CLUSTERS).get_accuracy(*given)
    assert found == pytest.approx({name: total / len(x) for name, total in totals.items()}, rel=1e-12)


@pytest.mark.parametrize("k", [None, 4])
def test_in_small_blocks_the_values_are_the_same(monkeypatch: pytest.MonkeyPatch, k: int | None) -> None:
    given = task("within", 9)
    whole = ours(k=k).get_accuracy(*given)
    monkeypatch.setattr(neighbors, "BUDGET", 100)
    assert ours(k=k).get_accuracy(*given) == pytest.approx(whole, rel=1e-14)


def test_a_calculator_holds_no_table_of_queries_and_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even with k=None, where every reference is a neighbour of every query."""
    sizes: list[int] = []

    class Watched(ExactKNN):
        def chunks(self, *arguments: Any) -> Any:
            for found in super().chunks(*arguments):
                sizes.append(found[1].numel())
                yield found

    monkeypatch.setattr(neighbors, "BUDGET", 2000)
    given = task("within", 9)
    assert_equal(ours(knn_func=Watched()).get_accuracy(*given), ours().get_accuracy(*given))
    assert len(sizes) == 4
    assert max(sizes) <= 16 * 139


def same_first_other_second(a: Tensor, b: Tensor) -> Tensor:
    return (a[..., 0] == b[..., 0]) & (a[..., 1] != b[..., 1])


def close(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs() < 1


@pytest.mark.parametrize("averaging", ["queries", "avg_of_avgs", "return_per_class"])
@pytest.mark.parametrize("comparison", [same_first_other_second, close])
def test_other_comparisons_of_labels_are_those_of_pml(
    averaging: str, comparison: Callable[[Tensor, Tensor], Tensor]
) -> None:
    x, labels, y, known = task("apart", 4)
    if comparison is close:
        labels, known = labels / 1.6, known / 1.7
    else:
        labels = torch.stack([labels, labels % 2], 1)
        known = torch.stack([known, torch.arange(len(known)) % 2], 1)
    arguments = {"exclude": CLUSTERS, "label_comparison_fn": comparison}
    arguments |= {} if averaging == "queries" else {averaging: True}
    found = ours(**arguments).get_accuracy(x, labels, y, known)
    assert_equal(found, pml(**arguments).get_accuracy(x, labels, y, known))


def test_a_query_that_does_not_match_itself_is_not_taken_off_r() -> None:
    """PML takes one off R for every query among the references, whether it is counted there or not."""
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    labels = torch.tensor([[0, 0], [0, 1], [0, 1], [0, 2]])
    found = ours(exclude=CLUSTERS, label_comparison_fn=same_first_other_second).get_accuracy(points, labels)
    # By distance: of 0: 1, 2, 3 (R=3); of 1: 0, 2, 3 (R=2); of 2: 1, 0, 3 (R=2); of 3: 2, 1, 0 (R=3).
    assert found["r_precision"] == pytest.approx((3 / 3 + 1 / 2 + 1 / 2 + 3 / 3) / 4)
    assert found["precision_at_1"] == pytest.approx(3 / 4)
    assert found["mean_average_precision"] == pytest.approx((1 + (1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2 + 1) / 4)


def test_labels_of_several_parts_are_equal_in_all_of_them() -> None:
    x, labels, y, known = task("apart", 4)
    paired, others = torch.stack([labels, labels % 2], 1), torch.stack([known, known % 2], 1)
    found = ours(exclude=CLUSTERS).get_accuracy(x, paired, y, others)
    assert_equal(found, ours(exclude=CLUSTERS).get_accuracy(x, labels, y, known))


def test_large_labels_stay_apart() -> None:
    """PML casts labels to float32, where these two are the same."""
    points = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    labels = torch.tensor([0, 1, 0, 1]) + 2**24
    found = ours(include=("precision_at_1",)).get_accuracy(points, labels)
    assert found == {"precision_at_1": 0.0}


def test_a_lone_query_is_left_out() -> None:
    points = torch.tensor([[0.0], [0.1], [5.0]])
    found = ours(exclude=CLUSTERS).get_accuracy(points, torch.tensor([0, 0, 1]))
    assert found == dict.fromkeys(RETRIEVAL, 1.0)


@pytest.mark.parametrize("k", [None, 2, "max_bin_count"])
def test_where_all_are_alone_there_is_no_value(caplog: pytest.LogCaptureFixture, k: Any) -> None:
    points, labels = torch.randn(4, 2), torch.arange(4)
    found = ours(exclude=CLUSTERS, k=k).get_accuracy(points, labels)
    assert list(found) == list(RETRIEVAL)
    assert all(isnan(value) for value in found.values())
    assert "None of the query labels" in caplog.text
    found = ours(exclude=CLUSTERS, k=k, return_per_class=True).get_accuracy(points, labels)
    assert all(len(values) == 4 and all(map(isnan, values)) for values in found.values())


def test_one_item_alone_has_no_neighbour() -> None:
    assert all(map(isnan, ours(exclude=CLUSTERS).get_accuracy(torch.ones(1, 2), [0]).values()))


def test_more_neighbours_than_references_is_all_of_them() -> None:
    """With faiss PML fills up with row -1, and counts the last label as found."""
    given = task("apart", 4)
    assert_equal(ours(k=1000).get_accuracy(*given), ours(k=80).get_accuracy(*given))


def test_a_neighbour_that_was_not_found_matches_nothing() -> None:
    """Approximate indexes answer -1 where they find fewer than k."""

    def half(query: Tensor, k: int, reference: Tensor, own: bool) -> tuple[Tensor, Tensor]:
        far, rows = ExactKNN()(query, k, reference, own)
        rows[:, k // 2 :] = -1
        return far, rows

    x, labels, y, known = task("apart", 3)
    labels[:], known[:] = 0, 0
    found = ours(exclude=CLUSTERS, knn_func=half).get_accuracy(x, labels, y, known)
    assert found["r_precision"] == found["mean_average_precision"] == 0.5


def test_the_reciprocal_rank_needs_no_other_metric() -> None:
    """In PML it fails alone, since its neighbours are not looked for."""
    given = task("alone", 4)
    alone = ours(include=("mean_reciprocal_rank",)).get_accuracy(*given)
    assert alone == {"mean_reciprocal_rank": ours().get_accuracy(*given)["mean_reciprocal_rank"]}


def test_arrays_and_lists_are_tensors() -> None:
    x, labels, y, known, own = task("within", 4)
    wanted = ours().get_accuracy(x, labels, y, known, own)
    arrays = [each.double().numpy() for each in (x, labels, y, known)]
    assert_equal(ours().get_accuracy(*arrays, own), wanted)
    assert_equal(ours().get_accuracy(*[each.tolist() for each in arrays], own), wanted)
    assert_equal(ours().get_accuracy(arrays[0], labels.numpy(), y, known, own), wanted)


class Fancy(AccuracyCalculator):
    def calculate_precision_at_2(self, knn_labels: Tensor, query_labels: Tensor, **kwargs: Any) -> Any:
        assert kwargs["knn_distances"].shape == knn_labels.shape
        assert len(kwargs["not_lone_query_mask"]) == len(query_labels)
        assert len(kwargs["label_counts"][0]) == len(kwargs["label_counts"][1])
        return precision_at_k(knn_labels, query_labels[:, None], 2)

    def calculate_clusters(self, cluster_labels: Tensor, **kwargs: Any) -> int:
        return len(cluster_labels.unique())

    def calculate_rows(self, query: Tensor, reference: Tensor, **kwargs: Any) -> tuple[int, int]:
        return len(query), len(reference)

    def requires_knn(self) -> list[str]:
        return [*super().requires_knn(), "precision_at_2"]

    def requires_clustering(self) -> list[str]:
        return [*super().requires_clustering(), "clusters"]


def test_metrics_of_ones_own_join_the_others() -> None:
    given = task("within", 4)
    fancy = Fancy(knn_func=ExactKNN(), kmeans_func=parity, device="cpu")
    found = fancy.get_accuracy(*given)
    assert (found["rows"], found["clusters"]) == ((60, 140), 4)
    rest = {name: value for name, value in found.items() if name not in ("rows", "clusters", "precision_at_2")}
    assert_equal(rest, ours().get_accuracy(*given))
    _, rows = ExactKNN()(given[0], 2, given[2], True)
    assert found["precision_at_2"] == pytest.approx(float((given[3][rows] == given[1][:, None]).double().mean()))
    assert fancy.get_accuracy(*given, include=("precision_at_2",)) == {"precision_at_2": found["precision_at_2"]}
    assert fancy.get_curr_metrics() == ["precision_at_2"]


def test_a_metric_written_anew_replaces_that_of_its_name() -> None:
    class Strict(AccuracyCalculator):
        def calculate_r_precision(self, **kwargs: Any) -> float:
            return -1.0

    found = Strict(exclude=CLUSTERS, knn_func=ExactKNN(), device="cpu").get_accuracy(*task("alone", 4))
    assert found["r_precision"] == -1
    assert found["precision_at_1"] == ours().get_accuracy(*task("alone", 4))["precision_at_1"]


def test_neighbours_are_found_by_the_function_that_is_given() -> None:
    calls: list[tuple[int, bool]] = []

    def farthest(query: Tensor, k: int, reference: Tensor, own: bool) -> tuple[Tensor, Tensor]:
        calls.append((k, own))
        far, rows = ExactKNN()(query, len(reference) - own, reference, own)
        return far.flip(1)[:, :k], rows.flip(1)[:, :k]

    found = ours(include=("precision_at_1",), k=3, knn_func=farthest).get_accuracy([[0.0], [1.0], [9.0]], [0, 0, 1])
    assert calls == [(2, True)]
    assert found == {"precision_at_1": 0.0}


def test_without_faiss_neighbours_and_clusters_are_found_with_torch(
    monkeypatch: pytest.MonkeyPatch, digits: tuple[Tensor, Tensor]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    calculator = AccuracyCalculator(device="cpu")
    assert type(calculator.knn_func) is ExactKNN
    assert type(calculator.kmeans_func) is KMeans
    found = calculator.get_accuracy(*digits)
    assert found["NMI"] > found["AMI"] > 0.6


def test_clusters_without_scikit_learn_are_refused_before_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def knn(*_: Any) -> Any:
        raise AssertionError("searched")

    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match="scikit-learn: pip install"):
        ours(knn_func=knn).get_accuracy(*task("alone", 4))
    assert ours(exclude=CLUSTERS).get_accuracy(*task("alone", 4))["precision_at_1"] >= 0


@pytest.mark.parametrize(("k", "warned"), [(5, True), (100, False), (None, False), ("max_bin_count", False)])
def test_k_below_r_warns_where_it_matters(caplog: pytest.LogCaptureFixture, k: Any, warned: bool) -> None:
    given = torch.randn(60, 4), torch.arange(60) % 4
    with caplog.at_level(logging.WARNING):
        ours(k=k).get_accuracy(*given, include=("precision_at_1", "mean_average_precision"))
        assert caplog.text == ""
        ours(k=k).get_accuracy(*given, include=("r_precision",))
        assert ("k=5 is less than the 14 references" in caplog.text) == warned


def test_the_largest_k_is_that_of_the_most_matches() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1])
    counts = torch.tensor([3, 2])
    for k, own, wanted in (("max_bin_count", True, 2), ("max_bin_count", False, 3), (None, True, 4), (1, True, 1)):
        assert ours(k=k, exclude=RETRIEVAL).determine_k(counts, len(labels), own) == wanted


def test_the_record_is_named_by_its_averaging() -> None:
    assert ours().description() == ""
    assert ours(avg_of_avgs=True).description() == "avg_of_avgs"


@pytest.mark.parametrize("k", [-1, 0, 1.5, "max"])
def test_another_k_is_refused(k: Any) -> None:
    with pytest.raises(ValueError, match="k must be"):
        ours(k=k)


def test_metrics_that_do_not_exist_are_refused() -> None:
    for where in ({"include": ("precision_at1",)}, {"exclude": ["precision_at1"]}):
        with pytest.raises(ValueError, match="did you mean 'precision_at_1'"):
            ours(**where)
        with pytest.raises(ValueError, match="did you mean 'precision_at_1'"):
            ours().get_accuracy(*task("alone", 4), **where)
    with pytest.raises(TypeError, match="tuples or lists"):
        ours(include="NMI")


def test_arguments_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        ours(avg_of_avgs=True, return_per_class=True)
    with pytest.raises(NotImplementedError, match="equal labels only"):
        ours(label_comparison_fn=close)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.ones(3, 2), [0, 1]), "one label per row"),
        ((torch.ones(0, 2), []), "a row at least"),
        ((torch.ones(3), [0, 1, 1]), "query must be .rows, dimension."),
        ((torch.ones(3, 2), np.zeros((3, 1, 1))), "labels must be"),
        ((torch.ones(3, 2), [0, 1, 1], torch.ones(3, 2)), "belong together"),
        ((torch.ones(3, 2), [0, 1, 1], torch.ones(3, 4), [0, 1, 1]), "must be alike"),
        ((torch.ones(3, 2), [0, 1, 1], torch.ones(3, 2), [0, 1]), "reference must have one label"),
        ((torch.ones(3, 2), [0, 1, 1], torch.zeros(4, 2), [0, 1, 1, 1], True), "first 3 references"),
        ((torch.ones(3, 2), [0, 1, 1], torch.ones(4, 2), [0, 0, 1, 1], True), "first 3 references"),
        ((torch.ones(3, 2), [0, 1, 1], torch.ones(2, 2), [0, 1], True), "first 3 references"),
        ((torch.tensor([[1.0], [torch.nan]]), [0, 1]), "query: row 1 is not finite"),
    ],
)
def test_what_does_not_fit_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours(exclude=CLUSTERS).get_accuracy(*given)
