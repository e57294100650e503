"""Each miner that draws nothing at random takes what PML's takes."""

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.miners as pml_miners
import torch
from torch import Tensor

from gradbank import distances, losses, miners

Tuples = list[list[tuple[int, ...]]]

DISTANCES: dict[str, Callable[[Any], Any]] = {
    "Lp": lambda m: m.LpDistance(),
    "cosine": lambda m: m.CosineSimilarity(),
    "manhattan": lambda m: m.LpDistance(p=1, power=2, normalize_embeddings=False),
    "dot": lambda m: m.DotProductSimilarity(normalize_embeddings=False),
    "SNR": lambda m: m.SNRDistance(),
}

MINERS: list[tuple[str, dict[str, Any]]] = [
    *(("TripletMarginMiner", {"margin": m, "type_of_triplets": t})
      for t in ("all", "hard", "semihard", "easy") for m in (0.2, 0.0, -0.1, 1.1)),
    *(("BatchEasyHardMiner", {"pos_strategy": p, "neg_strategy": n})
      for p in ("hard", "semihard", "easy", "all") for n in ("hard", "semihard", "easy", "all")
      if p != n or p != "semihard"
      if {p, n} != {"semihard", "all"}),
    ("BatchEasyHardMiner", {"allowed_pos_range": [0.3, 1.1], "allowed_neg_range": (0.5, 1.2)}),
    ("BatchEasyHardMiner", {"pos_strategy": "all", "neg_strategy": "hard", "allowed_pos_range": [0.9, 1.0]}),
    ("BatchHardMiner", {}),
    ("BatchHardMiner", {"allowed_neg_range": [0.9, 1.2]}),
    ("MultiSimilarityMiner", {"epsilon": 0.3}),
    ("PairMarginMiner", {"pos_margin": 0.9, "neg_margin": 1.1}),
    ("HDCMiner", {"filter_percentage": 0.3}),
    ("HDCMiner", {"filter_percentage": 0.0}),
    ("HDCMiner", {"filter_percentage": 1}),
]  # fmt: skip

LABELS = {
    "some": lambda n: torch.randint(3, (n,)),
    "one class": lambda n: torch.full((n,), 7),
    "all distinct": torch.arange,
}


def tuples(found: Any) -> Tuples:
    listed = [each.tolist() for each in found]
    parts = [listed] if len(listed) == 3 else [listed[:2], listed[2:]]
    return [sorted(zip(*part, strict=True)) for part in parts]


def unordered(found: Any) -> list[list[list[int]]]:
    return [sorted(map(sorted, part)) for part in tuples(found)]


def both(name: str, arguments: dict[str, Any], distance: str | None = None, **common: Any) -> tuple[Any, Any]:
    chosen = [{} if distance is None else {"distance": DISTANCES[distance](m)} for m in (distances, pml_distances)]
    ours = getattr(miners, name)(**arguments, **chosen[0], **common)
    return ours, getattr(pml_miners, name)(**arguments, **chosen[1], **common)


def batch(rows: int, labels: str, dtype: torch.dtype, dimension: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, dimension, dtype=dtype), LABELS[labels](rows)


def assert_same(ours: Any, theirs: Any, *given: Tensor) -> int:
    found, expected = ours(*given), theirs(*given)
    if isinstance(ours, miners.HDCMiner) and len(given) == 2:
        # of a pair and its mirror image, which are as far apart, rounding says which is among the hardest
        assert unordered(found) == unordered(expected)
    else:
        assert tuples(found) == tuples(expected)
    assert all(each.dtype == torch.int64 for each in found)
    return sum(map(len, found))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("name", "arguments"), MINERS, ids=str)
def test_tuples_are_those_of_pml(name: str, arguments: dict[str, Any], distance: str) -> None:
    torch.manual_seed(0)
    ours, theirs = both(name, arguments, distance)
    found = 0
    for rows, others in ((1, 4), (2, 1), (21, 16)):
        given = batch(rows, "some", torch.float64)
        found += assert_same(ours, theirs, *given)
        found += assert_same(ours, theirs, *given, *batch(others, "some", torch.float64))
        if name != "MultiSimilarityMiner":  # see test_anchor_of_a_second_view_is_no_pair_of_its_own
            found += assert_same(ours, theirs, *given, torch.randn(rows, 5, dtype=torch.float64))  # labels are both's
    nothing = arguments.get("type_of_triplets") == "semihard" and arguments["margin"] <= 0
    if distance == "Lp":  # for which the ranges are meant
        assert bool(found) != (nothing or arguments.get("filter_percentage") == 0)


@pytest.mark.parametrize("labels", ["one class", "all distinct"])
@pytest.mark.parametrize(("name", "arguments"), [*MINERS, ("AngularMiner", {})], ids=str)
def test_kinds_that_are_missing_are_left_out_as_in_pml(name: str, arguments: dict[str, Any], labels: str) -> None:
    torch.manual_seed(0)
    ours, theirs = both(name, arguments)
    assert_same(ours, theirs, *batch(12, labels, torch.float64))
    assert_same(ours, theirs, *batch(12, labels, torch.float64), *batch(7, "one class", torch.float64))


@pytest.mark.parametrize(("name", "arguments"), [*MINERS, ("AngularMiner", {"angle": 30})], ids=str)
def test_float32_tuples_are_those_of_pml(name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(1)
    ours, theirs = both(name, arguments)
    given = batch(40, "some", torch.float32, 16)
    assert_same(ours, theirs, *given)
    assert_same(ours, theirs, *given, *batch(30, "some", torch.float32, 16))


@pytest.mark.parametrize("angle", [0, 1, 20, 45, 60, 90, 120, -5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_are_those_of_pml(angle: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, theirs = both("AngularMiner", {"angle": angle})
    found = 0
    for scale in (1, 30):
        embeddings, labels = batch(30, "some", dtype)
        found += assert_same(ours, theirs, embeddings * scale, labels)
        found += assert_same(ours, theirs, embeddings * scale, labels, *batch(20, "some", dtype))
    assert bool(found) == (angle < 90)


def test_angle_on_the_threshold_is_decided_as_by_pml() -> None:
    """Far from the origin, products of embeddings are too coarse to tell; the embeddings themselves do."""
    torch.manual_seed(0)
    ours, theirs = both("AngularMiner", {"angle": 30})
    embeddings, labels = 1000 + torch.randn(30, 8), LABELS["some"](30)
    assert 0 < assert_same(ours, theirs, embeddings, labels) < 3 * 30 * 29 * 29 / 2


@pytest.mark.parametrize("distance", ["Lp", "cosine"])
@pytest.mark.parametrize(("name", "arguments"), [*MINERS, ("AngularMiner", {})], ids=str)
def test_statistics_are_those_of_pml(name: str, arguments: dict[str, Any], distance: str) -> None:
    torch.manual_seed(0)
    ours, theirs = both(name, arguments, None if name == "AngularMiner" else distance, collect_stats=True)
    given = batch(20, "some", torch.float64)
    for references in ((), batch(15, "some", torch.float64)):
        assert_same(ours, theirs, *given, *references)
        expected = {each: getattr(theirs, each) for each in theirs._record_these_stats}
        assert {each: getattr(ours, each) for each in expected} == pytest.approx(expected, rel=1e-9)
        assert all(isinstance(getattr(ours, each), int | float) for each in expected)


@pytest.mark.parametrize(("name", "arguments"), [*MINERS, ("AngularMiner", {})], ids=str)
def test_distance_of_a_miner_writes_what_it_does_for_pml(name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    made = [m.LpDistance(collect_stats=True) for m in (distances, pml_distances)]
    miner, theirs = (getattr(m, name)(**arguments, distance=d) for m, d in zip((miners, pml_miners), made))
    given = *batch(20, "some", torch.float64), *batch(15, "some", torch.float64)
    miner(*given)
    theirs(*given)
    for norm in made[1]._record_these_stats:  # 0 where the miner only asks it for norms
        assert getattr(made[0], norm) == pytest.approx(getattr(made[1], norm), rel=1e-9)
    kept = losses.CrossBatchMemory(losses.ContrastiveLoss(), 5, 20, miner=miner)
    kept(*given[:2])
    assert made[0].initial_avg_query_norm == pytest.approx(
        0 if name == "AngularMiner" else float(given[0].norm(dim=1).mean())
    )


@pytest.mark.parametrize("name", ["AngularMiner", "BatchEasyHardMiner", "PairMarginMiner", "TripletMarginMiner"])
def test_statistics_are_none_unless_collected(name: str) -> None:
    torch.manual_seed(0)
    ours, theirs = both(name, {}, collect_stats=True)
    quiet = getattr(miners, name)()
    counts = {"num_pos_pairs", "num_neg_pairs", "num_triplets"}
    written = set(theirs._record_these_stats) - counts
    assert written
    quiet(*batch(9, "some", torch.float32))
    assert all(getattr(quiet, each) is None for each in written)
    assert quiet.num_pos_pairs + quiet.num_triplets > 0
    assert all(getattr(ours, each) == 0 for each in written | counts)  # before the first call
    ours(*batch(9, "some", torch.float32))
    assert any(getattr(ours, each) != 0 for each in written)
    ours(*batch(9, "all distinct", torch.float32))
    triplets = {"AngularMiner", "TripletMarginMiner"}
    if name in triplets:  # of which there are none; PML's means are NaN
        assert all(getattr(ours, each) == 0 for each in written | counts)
