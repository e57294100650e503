"""What losses, their distances and their reducers write down if asked, against PML, by every engine."""

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.reducers as pml_reducers
import torch
from torch import Tensor

import gradbank
from gradbank import distances, engine, losses, miners, reducers
from gradbank.engine import Bounds

pytestmark = [  # in PML's HistogramLoss, and in its softmax with large margins
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence"),
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
]

D, C = 6, 5

ENGINES: dict[str, tuple[str, Bounds | None]] = {
    "dense": ("dense", None),
    "tiled": ("tiled", None),
    "small tiles": ("tiled", Bounds(tile=64, rows=6)),
    "block by block": ("tiled", Bounds(tile=64, rows=6, positives=9)),
}
every_engine = pytest.mark.parametrize("how", ENGINES.values(), ids=ENGINES)

REDUCERS: list[tuple[str, dict[str, Any]]] = [
    ("MeanReducer", {}),
    ("AvgNonZeroReducer", {}),
    ("ThresholdReducer", {"low": 0.1, "high": 0.7}),
    ("ThresholdReducer", {"high": 0.7}),
]
PAIR_LOSSES: dict[str, dict[str, Any]] = {
    "AngularLoss": {},
    "CircleLoss": {"m": 0.3, "gamma": 5},
    "ContrastiveLoss": {"pos_margin": 0.3, "neg_margin": 1.3},
    "FastAPLoss": {},
    "GeneralizedLiftedStructureLoss": {},
    "HistogramLoss": {},
    "IntraPairVarianceLoss": {"pos_eps": 0.1},
    "LiftedStructureLoss": {},
    "MultiSimilarityLoss": {},
    "NCALoss": {},
    "NPairsLoss": {},
    "NTXentLoss": {"temperature": 0.5},
    "SupConLoss": {"temperature": 0.5},
    "TripletMarginLoss": {"margin": 0.3},
    "TupletMarginLoss": {"scale": 3},
}
ANGLE_LOSSES = ("ArcFaceLoss", "CosFaceLoss", "LargeMarginSoftmaxLoss", "SphereFaceLoss", "SubCenterArcFaceLoss")
CLASS_LOSSES = (*ANGLE_LOSSES, "NormalizedSoftmaxLoss", "ProxyNCALoss", "ProxyAnchorLoss", "SoftTripleLoss")


def batch(seed: int, size: int = 20) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, D, dtype=torch.float64, generator=generator)
    return rows, torch.randint(C, (size,), generator=generator)


def both(make: Callable[[Any, Any, Any], Any]) -> tuple[Any, Any]:
    """What `make(losses, distances, reducers)` makes of ours and of PML's, of one seed."""
    made = []
    for libraries in ((losses, distances, reducers), (pml_losses, pml_distances, pml_reducers)):
        torch.manual_seed(0)
        made.append(make(*libraries))
    return made[0], made[1]


def alike(distance: Any, library: Any) -> Any:
    """The same distance, with statistics."""
    options = {} if isinstance(distance, distances.CosineSimilarity) else {"power": distance.power}
    return getattr(library, type(distance).__name__)(collect_stats=True, **options)


def a_loss(name: str, reducer: tuple[str, dict[str, Any]], *sizes: int, **options: Any) -> tuple[Any, Any]:
    default = getattr(losses, name)(*sizes).distance
    sized = dict(zip(("num_classes", "embedding_size"), sizes))

    def make(library: Any, measuring: Any, reducing: Any) -> Any:
        kind, bounds = reducer
        reduces = getattr(reducing, kind)(collect_stats=True, **bounds)
        distance = alike(default, measuring)
        return getattr(library, name)(**sized, **options, distance=distance, reducer=reduces, collect_stats=True)

    return both(make)


def skip_refused(name: str, how: tuple[str, Bounds | None]) -> None:
    joining = ("AngularLoss", "HistogramLoss", "IntraPairVarianceLoss", "LiftedStructureLoss")
    if how == ENGINES["block by block"] and name in joining:
        pytest.skip("refused: it is written on all positives together")


def statistics(theirs: Any) -> dict[str, float]:
    names = [name for name in getattr(theirs, "_record_these_stats", ()) if name != "num_below_high"]
    return {name: float(getattr(theirs, name)) for name in names}


def assert_same(ours: Any, theirs: Any, part: str | None = None) -> None:
    """Of a loss, its distance, and its reducer; PML has a reducer for each part, of which ours shows the last."""
    of_part = theirs.reducer
    if hasattr(of_part, "reducers"):
        of_part = of_part.reducers[part or list(of_part.reducers)[-1]]
    for mine, other in ((ours, theirs), (ours.distance, theirs.distance), (ours.reducer, of_part)):
        wanted = statistics(other)
        assert {name: getattr(mine, name) for name in wanted} == pytest.approx(wanted, rel=1e-6, abs=1e-9)
        assert all(type(getattr(mine, name)) in (int, float) for name in wanted)


@every_engine
@pytest.mark.parametrize("reducer", REDUCERS, ids=str)
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_statistics_are_those_of_pml(name: str, reducer: Any, how: Any) -> None:
    ours, theirs = a_loss(name, reducer, **PAIR_LOSSES[name])
    skip_refused(name, how)
    with engine.using(*how):
        for given in (batch(0), (*batch(1), None, *batch(2, 31))):
            if len(given) == 2 or ours.takes_references:
                ours(*given)
                theirs(*given)
                assert_same(ours, theirs)
    assert ours.reducer.losses_size > 0
    listed = (torch.tensor([0, 0, 3]), torch.tensor([1, 1, 4]), torch.tensor([7, 8, 9]))
    if name not in ("NPairsLoss", "HistogramLoss"):  # which take one, or the pairs of triplets once
        ours(*batch(3), listed)
        theirs(*batch(3), listed)
        assert_same(ours, theirs)


@every_engine
@pytest.mark.parametrize(
    "name", ["AngularLoss", "ContrastiveLoss", "NTXentLoss", "TripletMarginLoss", "TupletMarginLoss"]
)
def test_a_bank_passes_them_through(name: str, how: Any) -> None:
    skip_refused(name, how)
    inner, their_inner = a_loss(name, REDUCERS[2], **PAIR_LOSSES[name])
    ours, theirs = losses.CrossBatchMemory(inner, D, 50), pml_losses.CrossBatchMemory(their_inner, D, 50)
    for step in range(4):
        with engine.using(*how):
            ours(*batch(step))
        theirs(*batch(step))
        assert_same(inner, their_inner)
    if name != "AngularLoss":  # which measures nothing with its distance
        assert inner.distance.initial_avg_query_norm not in (0, inner.distance.initial_avg_ref_norm)


@pytest.mark.parametrize("reducer", REDUCERS, ids=str)
@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_classification_writes_the_angles_to_the_own_class(name: str, reducer: Any) -> None:
    ours, theirs = a_loss(name, reducer, C, D)
    for seed in range(2):
        embeddings, labels = batch(seed)
        ours.double()(embeddings, labels)
        theirs.double()(embeddings, labels)
        assert_same(ours, theirs)
    assert (ours.avg_angle > 0) if name in ANGLE_LOSSES else not hasattr(ours, "avg_angle")


@every_engine
def test_each_part_has_its_own_with_a_reducer_for_each(how: Any) -> None:
    def make(library: Any, _: Any, reducing: Any) -> Any:
        each = {name: reducing.AvgNonZeroReducer(collect_stats=True) for name in ("pos_loss", "neg_loss")}
        return library.ContrastiveLoss(pos_margin=0.3, reducer=reducing.MultipleReducers(each))

    ours, theirs = both(make)
    with engine.using(*how):
        ours(*batch(0))
    theirs(*batch(0))
    for part in ("pos_loss", "neg_loss"):
        mine = ours.reducer.of(part)
        wanted = statistics(theirs.reducer.reducers[part])
        assert {name: getattr(mine, name) for name in wanted} == wanted
    assert ours.reducer.of("pos_loss").losses_size != ours.reducer.of("neg_loss").losses_size


@every_engine
@pytest.mark.parametrize("learned", [{}, {"learn_beta": True, "nu": 0.1, "num_classes": C}])
def test_divisor_is_that_of_the_loss(learned: dict[str, Any], how: Any) -> None:
    ours, theirs = a_loss("MarginLoss", ("DivisorReducer", {}), **learned)
    for given in (batch(0), (*batch(1), None, *batch(2, 31))):
        with engine.using(*how):
            ours(*given)
        theirs(*given)
        assert_same(ours, theirs, "beta_reg_loss" if learned else "margin_loss")
    assert ours.reducer.divisor > ours.reducer.losses_size > 0


def test_divisor_of_proxies_is_that_of_the_last_part() -> None:
    ours, theirs = a_loss("ProxyAnchorLoss", ("DivisorReducer", {}), 40, D)
    ours.double()(*batch(0))
    theirs.double()(*batch(0))
    assert_same(ours, theirs)
    assert ours.reducer.divisor == 40


@every_engine
def test_means_by_anchor_are_losses_of_the_reducer_within(how: Any) -> None:
    def make(library: Any, _: Any, reducing: Any) -> Any:
        within = reducing.ThresholdReducer(low=0.5, high=0.9, collect_stats=True)
        return library.NTXentLoss(0.5, reducer=reducing.PerAnchorReducer(within, collect_stats=True))

    ours, theirs = both(make)
    with engine.using(*how):
        ours(*batch(0))
    theirs(*batch(0))
    for mine, other in ((ours.reducer, theirs.reducer), (ours.reducer.reducer, theirs.reducer.reducer)):
        wanted = statistics(other)
        assert {name: getattr(mine, name) for name in wanted} == wanted
    assert ours.reducer.losses_size > ours.reducer.reducer.losses_size == 20


@every_engine
def test_losses_below_the_upper_bound_are_counted_whatever_the_lower_one(how: Any) -> None:
    """PML counts them among those that are past the lower one, and calls the number num_above_high."""
    ours, theirs = a_loss("NTXentLoss", ("ThresholdReducer", {"low": 2, "high": 3}), temperature=0.5)
    every = losses.NTXentLoss(0.5, reducer=reducers.DoNothingReducer())(*batch(0))["loss"]["losses"]  # type: ignore[call-overload, index]
    with engine.using(*how):
        ours(*batch(0))
    theirs(*batch(0))
    assert ours.reducer.num_below_high == int((every < 3).sum()) > ours.reducer.num_past_filter
    assert theirs.reducer.num_above_high == ours.reducer.num_past_filter
    assert theirs.reducer.num_below_high == 0


@every_engine
def test_without_any_pair_there_are_no_losses(how: Any) -> None:
    """PML takes the 0 that it returns for one."""
    ours, theirs = a_loss("TupletMarginLoss", ("AvgNonZeroReducer", {}))
    with engine.using(*how):
        ours(*batch(0))
        assert ours.avg_pos_angle > 0
        alone = torch.arange(5)
        ours(batch(1)[0][:5], alone)
    theirs(batch(1)[0][:5], alone)
    assert (ours.reducer.losses_size, theirs.reducer.losses_size) == (0, 1)
    assert ours.reducer.num_past_filter == ours.avg_pos_angle == theirs.avg_pos_angle == 0
    assert ours.avg_neg_angle > theirs.avg_neg_angle == 0  # there are negatives


def test_miner_of_intervals_stays_one_when_distances_are_watched() -> None:
    """Statistics aside, the distances of loss and miner are the same: no triplet has to be listed for the queue."""
    loss = losses.TripletMarginLoss(distance=distances.LpDistance(collect_stats=True))
    miner = miners.TripletMarginMiner(distance=distances.LpDistance(collect_stats=True))
    for watched in (loss.distance, miner.distance):
        assert watched.measures_as(distances.LpDistance())
        assert not watched.measures_as(distances.LpDistance(p=1))
    losses.CrossBatchMemory(loss, D, 50, miner=miner)(*batch(0))
    assert miner.num_triplets == 0
    assert miner.distance.initial_avg_query_norm == loss.distance.initial_avg_query_norm > 0


def test_every_loss_that_measures_with_its_distance_has_it_write() -> None:
    """PML's `ThresholdConsistentMarginLoss` makes its cosines without it."""
    ours, theirs = a_loss("ThresholdConsistentMarginLoss", ("MeanReducer", {}))
    ours(*batch(0))
    theirs(*batch(0))
    assert theirs.distance.initial_avg_query_norm == 0
    assert ours.distance.initial_avg_query_norm == pytest.approx(float(batch(0)[0].norm(dim=1).mean()))


def test_vectors_of_one_direction_are_at_angle_zero() -> None:
    """Rounding brings their cosine above 1 in float32, and PML's mean is NaN."""
    ours, theirs = a_loss("TupletMarginLoss", ("MeanReducer", {}))
    rows = torch.linspace(0.1, 3, 12)[:, None] * torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 11.0])
    labels = torch.arange(12) // 3
    ours(rows, labels)
    theirs(rows, labels)
    assert ours.avg_pos_angle < 0.1
    assert ours.avg_neg_angle < 0.1
    assert theirs.avg_neg_angle != theirs.avg_neg_angle


@pytest.mark.parametrize("kind", ["pairs", "triplets"])
def test_a_reducer_that_sees_every_loss_counts_them(kind: str) -> None:
    class Squares(reducers.MeanReducer):
        def element_reduction(self, losses: Tensor, *_: Any, **__: Any) -> Tensor:
            return (losses**2).mean()

        pos_pair_reduction = neg_pair_reduction = triplet_reduction = element_reduction

    name = "NTXentLoss" if kind == "pairs" else "TripletMarginLoss"
    reducer = Squares(collect_stats=True)
    getattr(losses, name)(reducer=reducer)(*batch(0))
    plain, _ = a_loss(name, ("MeanReducer", {}))
    plain(*batch(0))
    assert reducer.losses_size == plain.reducer.losses_size > 0


def test_nothing_is_looked_at_twice_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("statistics were not asked for")

    for where, name in ((engine, "count"), (distances.Distance, "_mean_norms"), (losses.PairLoss, "reset_stats")):
        monkeypatch.setattr(where, name, refuse)
    for name in ("ContrastiveLoss", "TripletMarginLoss", "TupletMarginLoss"):
        loss = getattr(losses, name)()
        loss(*batch(0))
        losses.CrossBatchMemory(loss, D, 50)(*batch(0))
        assert loss.reducer.losses_size is loss.distance.initial_avg_query_norm is None
    assert losses.TupletMarginLoss().avg_pos_angle is None


@pytest.mark.parametrize("name", ["TupletMarginLoss", "AngularLoss", "ArcFaceLoss"])
def test_statistics_are_zero_before_the_first_call(name: str) -> None:
    ours, theirs = a_loss(name, REDUCERS[2], *((C, D) if name == "ArcFaceLoss" else ()))
    assert_same(ours, theirs)
    assert not any(statistics(theirs).values())
    assert ours.reducer.num_below_high == 0


def test_a_call_that_fails_leaves_them() -> None:
    weights = torch.ones(C, dtype=torch.float64)
    loss = losses.TupletMarginLoss(
        distance=distances.CosineSimilarity(collect_stats=True),
        reducer=reducers.ClassWeightedReducer(weights, collect_stats=True),
        collect_stats=True,
    )
    loss(*batch(0))
    before = loss.avg_pos_angle, loss.distance.initial_avg_query_norm, loss.reducer.losses_size
    embeddings, labels = batch(1)
    with pytest.raises(ValueError, match="weights for the labels"):
        loss(embeddings, labels + 3)
    with pytest.raises(ValueError, match="labels must be"):
        loss(embeddings, labels[1:])
    assert (loss.avg_pos_angle, loss.distance.initial_avg_query_norm, loss.reducer.losses_size) == before


def test_gradients_are_the_same_with_statistics() -> None:
    for name in ("ContrastiveLoss", "TripletMarginLoss", "TupletMarginLoss", "AngularLoss", "MarginLoss"):
        found = []
        for loss in (a_loss(name, REDUCERS[2])[0], getattr(losses, name)(reducer=reducers.ThresholdReducer(0.1, 0.7))):
            leaf = batch(0)[0].requires_grad_()
            loss(leaf, batch(0)[1]).backward()
            assert leaf.grad is not None
            found.append(leaf.grad)
        assert torch.equal(*found)


def test_the_argument_is_of_the_spec_and_of_what_is_rebuilt() -> None:
    loss, theirs = a_loss("TupletMarginLoss", ("AvgNonZeroReducer", {}))
    bank = losses.CrossBatchMemory(loss, D, 50, collect_stats=True)
    sent = bank.spec().arguments["loss"].arguments
    assert sent["collect_stats"] is sent["distance"].arguments["collect_stats"] is True
    again: Any = bank.rebuilt()
    assert again.loss.avg_pos_angle == again.loss.distance.final_avg_ref_norm == again.loss.reducer.losses_size == 0
    converted = gradbank.from_pml(theirs)
    converted(*batch(0))
    theirs(*batch(0))
    assert_same(converted, theirs)
