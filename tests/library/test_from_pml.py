"""A live object of pytorch-metric-learning is converted to the component that computes the same."""

import copy
import inspect
import re
from typing import Any

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils.common_functions import TorchInitWrapper
from torch import Tensor, nn

import gradbank
from gradbank.component import Component

# PML's LargeMarginSoftmaxLoss calls scipy in a way that numpy is about to stop
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning"),  # in PML's HistogramLoss
]

CLASSES, DIMENSION, PER_CLASS = 4, 6, 4

# arguments that are not the defaults, for each class that takes any
ARGUMENTS: dict[type, dict[str, Any]] = {
    losses.AngularLoss: {"alpha": 35},
    losses.ArcFaceLoss: {"num_classes": CLASSES, "embedding_size": DIMENSION, "margin": 17.3, "scale": 32},
    losses.CircleLoss: {"m": 0.3, "gamma": 20},
    losses.ContrastiveLoss: {"pos_margin": 0.1, "neg_margin": 1.2, "distance": distances.LpDistance(p=1)},
    losses.CosFaceLoss: {"num_classes": CLASSES, "embedding_size": DIMENSION, "margin": 0.2, "scale": 16},
    losses.CrossBatchMemory: {"loss": losses.ContrastiveLoss(), "embedding_size": DIMENSION, "memory_size": 24},
    losses.DynamicSoftMarginLoss: {"min_val": -2.5, "num_bins": 8, "momentum": 0.05},
    losses.FastAPLoss: {"num_bins": 7},
    losses.GeneralizedLiftedStructureLoss: {"neg_margin": 0.9, "pos_margin": 0.1},
    losses.HistogramLoss: {"n_bins": 40},
    losses.InstanceLoss: {"gamma": 16},
    losses.IntraPairVarianceLoss: {"pos_eps": 0.05, "neg_eps": 0.02},
    losses.LargeMarginSoftmaxLoss: {"num_classes": CLASSES, "embedding_size": DIMENSION, "margin": 3, "scale": 2},
    losses.LiftedStructureLoss: {"neg_margin": 0.9, "pos_margin": 0.1},
    losses.ManifoldLoss: {"l": DIMENSION, "K": CLASSES, "lambdaC": 0.5, "alpha": 0.7, "margin": 1e-3},
    losses.MarginLoss: {"margin": 0.3, "nu": 0.2, "beta": 1.1, "learn_beta": True, "num_classes": CLASSES},
    losses.MultiSimilarityLoss: {"alpha": 3, "beta": 20, "base": 0.4},
    losses.MultipleLosses: {"losses": [losses.SupConLoss(), losses.TripletMarginLoss(0.2)], "weights": [0.5, 2.0]},
    losses.NCALoss: {"softmax_scale": 2.0},
    losses.NormalizedSoftmaxLoss: {"num_classes": CLASSES, "embedding_size": DIMENSION, "temperature": 0.1},
    losses.NTXentLoss: {"temperature": 0.2, "reducer": reducers.ThresholdReducer(low=0.1)},
    losses.P2SGradLoss: {"descriptors_dim": DIMENSION, "num_classes": CLASSES},
    losses.PNPLoss: {"b": 3, "alpha": 2, "anneal": 0.05, "variant": "Ib"},
    losses.ProxyAnchorLoss: {"num_classes": CLASSES, "embedding_size": DIMENSION, "margin": 0.2, "alpha": 16},
    losses.ProxyNCALoss: {"num_classes": CLASSES, "embedding_size": DIMENSION, "softmax_scale": 2},
    losses.RankedListLoss: {"margin": 0.4, "Tn": 2, "imbalance": 0.4, "alpha": 1.3, "Tp": 1},
    losses.SelfSupervisedLoss: {"loss": losses.NTXentLoss(0.3), "symmetric": False},
    losses.SignalToNoiseRatioContrastiveLoss: {"pos_margin": 0.05, "neg_margin": 0.9},
    losses.SmoothAPLoss: {"temperature": 0.02},
    losses.SoftTripleLoss: {
        "num_classes": CLASSES,
        "embedding_size": DIMENSION,
        "centers_per_class": 3,
        "la": 10,
        "gamma": 0.3,
        "margin": 0.05,
        "weight_regularizer": regularizers.SparseCentersRegularizer(CLASSES, 3),
        "weight_reg_weight": 0.2,
    },
    losses.SphereFaceLoss: {"num_classes": CLASSES, "embedding_size": DIMENSION, "margin": 3, "scale": 2},
    losses.SubCenterArcFaceLoss: {
        "num_classes": CLASSES,
        "embedding_size": DIMENSION,
        "margin": 12.1,
        "sub_centers": 2,
    },
    losses.SupConLoss: {"temperature": 0.3},
    losses.ThresholdConsistentMarginLoss: {"lambda_plus": 0.9, "margin_plus": 0.8, "margin_minus": 0.4},
    losses.TripletMarginLoss: {"margin": 0.3},
    losses.TupletMarginLoss: {"margin": 7.7, "scale": 32},
    losses.VICRegLoss: {"invariance_lambda": 20, "variance_mu": 15, "covariance_v": 2, "eps": 1e-3},
    distances.CosineSimilarity: {"power": 2},
    distances.DotProductSimilarity: {"normalize_embeddings": False},
    distances.LpDistance: {"p": 1, "power": 2, "normalize_embeddings": False},
    distances.SNRDistance: {"power": 2},
    miners.AngularMiner: {"angle": 12.3},
    miners.BatchEasyHardMiner: {"pos_strategy": "hard", "neg_strategy": "easy", "allowed_pos_range": (0.1, 1.6)},
    miners.DistanceWeightedMiner: {"cutoff": 0.4, "nonzero_loss_cutoff": 1.5},
    miners.HDCMiner: {"filter_percentage": 0.4},
    miners.MultiSimilarityMiner: {"epsilon": 0.2},
    miners.PairMarginMiner: {"pos_margin": 0.3, "neg_margin": 1.1},
    miners.TripletMarginMiner: {"margin": 0.3, "type_of_triplets": "semihard"},
    miners.UniformHistogramMiner: {"num_bins": 5, "pos_per_bin": 3, "neg_per_bin": 4},
    reducers.ClassWeightedReducer: {"weights": torch.linspace(0.5, 2, CLASSES)},
    reducers.MultipleReducers: {"reducers": {"pos_loss": reducers.SumReducer()}},
    reducers.PerAnchorReducer: {"reducer": reducers.ThresholdReducer(low=0.1)},
    reducers.ThresholdReducer: {"low": 0.1, "high": 5.0},
    regularizers.LpRegularizer: {"p": 1, "power": 2},
    regularizers.SparseCentersRegularizer: {"num_classes": CLASSES, "centers_per_class": PER_CLASS},
}

# what they cannot be compared by is said beside each
RANDOM = {"DistanceWeightedMiner", "UniformHistogramMiner"}  # they draw, and not in the same order
DIFFERENT = {"SmoothAPLoss"}  # PML's is wrong for labels that are not sorted with as many classes as samples of each


def everything(package: Any, root: type) -> list[type]:
    """Every class of PML's package that can be made and used."""
    classes = [each for _, each in inspect.getmembers(package, inspect.isclass) if issubclass(each, root)]
    no_use_alone = re.compile("Base.*|Generic.*|.*Mixin|BatchedDistance")
    return [each for each in classes if not no_use_alone.fullmatch(each.__name__)]


def made(cls: type) -> Any:
    torch.manual_seed(0)
    return copy.deepcopy(cls(**ARGUMENTS.get(cls, {})))


def converted(obj: Any) -> Any:
    """The component, if gradbank has its class by now, and those of what is inside."""
    try:
        component = gradbank.from_pml(obj)
    except TypeError as error:
        if not str(error).endswith("which gradbank does not have"):
            raise
        pytest.skip(str(error))
    assert isinstance(component, Component)
    assert type(component).__name__ == type(obj).__name__
    return component


def batch(seed: int, size: int = CLASSES * PER_CLASS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(size, DIMENSION, dtype=torch.float64), torch.arange(size) % CLASSES


def computed(obj: Any, *inputs: Any) -> list[Tensor]:
    """The loss, and its gradients with respect to the embeddings and to the weights, by name."""
    embeddings = inputs[0].clone().requires_grad_()
    weights = dict(sorted(obj.named_parameters()))
    loss = obj(embeddings, *inputs[1:])
    return [loss, *torch.autograd.grad(loss, [embeddings, *weights.values()], allow_unused=True)]


def assert_equal(obj: Any, component: Any, *inputs: Any) -> None:
    wanted, got = computed(obj.double(), *inputs), computed(component.double(), *inputs)
    assert len(wanted) == len(got)
    for theirs, ours in zip(wanted, got):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if ours is None else ours, zero if theirs is None else theirs, rtol=1e-6, atol=1e-7, check_dtype=False
        )


@pytest.mark.parametrize("cls", everything(losses, nn.Module), ids=lambda cls: cls.__name__)
def test_a_loss_computes_what_it_did(cls: type) -> None:
    obj = made(cls)
    if cls is losses.DynamicSoftMarginLoss:
        obj(*batch(0))  # it remembers what it saw
    component = converted(obj)
    if cls.__name__ in DIFFERENT:
        return
    embeddings, labels = batch(1)
    if cls.__name__ in ("SelfSupervisedLoss", "VICRegLoss"):
        second = batch(2)[0]
        inputs: tuple[Any, ...] = (
            (embeddings, second) if cls is losses.SelfSupervisedLoss else (embeddings, None, None, second)
        )
    elif cls is losses.ManifoldLoss:
        inputs = (embeddings, None, torch.arange(len(labels)) % CLASSES)
    else:
        inputs = (embeddings, labels)
    assert_equal(obj, component, *inputs)


@pytest.mark.parametrize("cls", everything(distances, distances.BaseDistance), ids=lambda cls: cls.__name__)
def test_a_distance_computes_what_it_did(cls: type) -> None:
    obj = made(cls)
    component = converted(obj)
    rows, others = batch(1)[0], batch(2)[0]
    torch.testing.assert_close(component(rows, others), obj(rows, others))
    assert component.is_inverted == obj.is_inverted


@pytest.mark.parametrize("cls", everything(miners, miners.BaseMiner), ids=lambda cls: cls.__name__)
def test_a_miner_mines_what_it_did(cls: type) -> None:
    obj = made(cls)
    component = converted(obj)
    embeddings, labels = batch(3, 24)
    if cls is miners.EmbeddingsAlreadyPackagedAsTriplets:
        labels = torch.arange(24)
    wanted, got = obj(embeddings, labels), component(embeddings, labels)
    assert len(wanted) == len(got)
    if cls.__name__ not in RANDOM:
        for parts in (slice(0, 2), slice(2, 4)) if len(got) == 4 else (slice(0, 3),):
            assert set(zip(*(part.tolist() for part in got[parts]))) == set(
                zip(*(part.tolist() for part in wanted[parts]))
            )


def test_a_miner_keeps_the_pairs_that_it_was_given() -> None:
    miner, (embeddings, labels) = miners.HDCMiner(), batch(3)
    pairs = tuple(torch.randint(len(labels), (20,)) for _ in range(4))
    miner.set_idx_externally(pairs, labels)
    component = converted(miner)
    for theirs, ours in zip(miner(embeddings, labels), component(embeddings, labels)):
        assert sorted(ours.tolist()) == sorted(theirs.tolist())
    assert component.was_set_externally


@pytest.mark.parametrize("cls", everything(reducers, reducers.BaseReducer), ids=lambda cls: cls.__name__)
def test_a_reducer_reduces_what_it_did(cls: type) -> None:
    obj = made(cls)
    converted(obj)
    loss = losses.ContrastiveLoss(reducer=obj)
    if cls is reducers.DivisorReducer:
        loss = losses.ProxyAnchorLoss(CLASSES, DIMENSION, reducer=obj)
    component = converted(loss)
    if cls is reducers.DoNothingReducer:
        assert type(component.reducer).__name__ == "DoNothingReducer"
    else:
        assert_equal(loss, component, *batch(4))


@pytest.mark.parametrize("cls", everything(regularizers, regularizers.BaseRegularizer), ids=lambda cls: cls.__name__)
def test_a_regularizer_costs_what_it_did(cls: type) -> None:
    obj = made(cls)
    component = converted(obj)
    rows = batch(5)[0]
    assert_equal(obj, component, rows)
    if cls is not regularizers.SparseCentersRegularizer:
        loss = losses.ContrastiveLoss(embedding_regularizer=obj, embedding_reg_weight=0.3)
        assert_equal(loss, converted(loss), *batch(6))
    loss = losses.ArcFaceLoss(CLASSES * PER_CLASS, DIMENSION, weight_regularizer=obj, weight_reg_weight=0.3)
    assert_equal(loss, converted(loss), *batch(6))


# -- what they were made with -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls",
    [
        each
        for package in (losses, distances, miners, reducers, regularizers)
        for each in everything(package, nn.Module)
    ],
    ids=lambda cls: cls.__name__,
)
def test_the_arguments_are_those_that_were_given(cls: type) -> None:
    component = converted(made(cls))
    plain = {
        name: value for name, value in ARGUMENTS.get(cls, {}).items() if isinstance(value, int | float | str | tuple)
    }
    if cls is losses.HistogramLoss:
        plain = {"delta": 2 / 40}  # all that PML keeps
    if cls is losses.MarginLoss:
        assert component.arguments().pop("beta") is not None
        del plain["beta"]
    given = component.arguments()
    for name, value in plain.items():
        assert given[name] == value, name


@pytest.mark.parametrize("margin", [28.6, 5.73, 40, 0.1, 1 / 3, 57.29577951308232])
def test_degrees_are_not_rounded_on_the_way(margin: float) -> None:
    assert gradbank.from_pml(losses.ArcFaceLoss(3, 4, margin=margin)).margin == pytest.approx(margin, rel=1e-15)
    if margin != 1 / 3:
        assert gradbank.from_pml(losses.ArcFaceLoss(3, 4, margin=margin)).margin == margin


def test_weights_are_copied_with_what_they_were() -> None:
    loss = losses.ArcFaceLoss(3, 4, weight_init_func=TorchInitWrapper(nn.init.constant_, val=0.5)).double().eval()
    loss.W.requires_grad_(False)
    component = gradbank.from_pml(loss)
    assert torch.equal(component.W, loss.W)
    assert (component.W.dtype, component.W.requires_grad, component.training) == (torch.float64, False, False)
    with torch.no_grad():
        component.W.zero_()
    assert bool((loss.W == 0.5).all()), "the original is left as it was"
    assert component.spec().arguments["margin"] == 28.6


# -- what is inside ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4], ids="{} batches".format)
def test_a_memory_goes_on_from_where_it_was(steps: int) -> None:
    memory = losses.CrossBatchMemory(losses.NTXentLoss(0.2), DIMENSION, 20, miners.MultiSimilarityMiner(0.3)).double()
    for seed in range(steps):
        memory(*batch(seed, 6))
    component = gradbank.from_pml(memory)
    assert (component.queue_idx, component.has_been_filled) == (memory.queue_idx, memory.has_been_filled)
    assert type(component.miner).__name__ == "MultiSimilarityMiner"
    for seed in range(10, 15):
        assert_equal(memory, component, *batch(seed, 6))
    assert torch.equal(component.label_memory, memory.label_memory)


def test_a_memory_of_labels_that_are_no_integers_is_refused() -> None:
    memory = losses.CrossBatchMemory(losses.NTXentLoss(), DIMENSION, 20)
    memory(batch(0)[0], torch.rand(len(batch(0)[0])))
    with pytest.raises(ValueError, match=r"^CrossBatchMemory cannot be converted: .*label_memory integers"):
        gradbank.from_pml(memory)


@pytest.mark.parametrize("as_dict", [False, True], ids=["list", "dict"])
def test_losses_within_losses_are_converted(as_dict: bool) -> None:
    inner = {
        "near": losses.ContrastiveLoss(0.1),
        "soft": losses.SupConLoss(0.3),
        "arc": losses.ArcFaceLoss(4, DIMENSION),
    }
    mining = miners.MultiSimilarityMiner()
    several = (
        losses.MultipleLosses(inner, {"soft": mining}, {"near": 1, "soft": 2, "arc": 0.1})
        if as_dict
        else losses.MultipleLosses(list(inner.values()), [None, mining, None], [1, 2, 0.1])
    )
    component = converted(several)
    assert_equal(several, component, *batch(7))
    assert component.spec() == component.rebuilt().spec()


def test_what_was_shared_stays_shared() -> None:
    arc = losses.ArcFaceLoss(4, DIMENSION)
    component = converted(losses.MultipleLosses([arc, arc]))
    assert component.losses[0] is component.losses[1]


def test_a_reducer_that_pml_copied_for_each_part_is_one_again() -> None:
    loss = gradbank.from_pml(losses.ContrastiveLoss(reducer=reducers.ThresholdReducer(low=0.2)))
    assert (type(loss.reducer).__name__, loss.reducer.low) == ("ThresholdReducer", 0.2)
    regularized = losses.NTXentLoss(embedding_regularizer=regularizers.LpRegularizer())
    assert type(regularized.reducer).__name__ == "MultipleReducers"
    assert type(gradbank.from_pml(regularized).reducer).__name__ == "MeanReducer"
    differing = reducers.MultipleReducers({"pos_loss": reducers.MeanReducer(), "neg_loss": reducers.SumReducer()})
    several = losses.ContrastiveLoss(reducer=differing)
    assert type(converted(several).reducer).__name__ == "MultipleReducers"
    assert_equal(several, converted(several), *batch(8))


def test_a_function_is_kept_where_one_is_taken() -> None:
    def harmonic(losses: Tensor, count: Tensor) -> Tensor:
        return losses.sum(1) / (count + 1)

    loss = losses.SupConLoss(reducer=reducers.PerAnchorReducer(aggregation_func=harmonic))
    assert converted(loss).reducer.aggregation_func is harmonic
    contrastive = losses.ContrastiveLoss(reducer=reducers.PerAnchorReducer(aggregation_func=harmonic))
    assert_equal(contrastive, converted(contrastive), *batch(9))


def test_a_component_is_left_as_it_is() -> None:
    loss = gradbank.losses.NTXentLoss()
    assert gradbank.from_pml(loss) is loss
    own = gradbank.distances.LpDistance(p=3)
    assert gradbank.from_pml(losses.ContrastiveLoss(distance=own)).distance is own
