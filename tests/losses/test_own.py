"""A user's own losses and reducers, written for pytorch-metric-learning, run here as they ran there."""

from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.reducers as pml_reducers
import pytorch_metric_learning.regularizers as pml_regularizers
import torch
from torch import Tensor

import gradbank
from gradbank import component, distances, losses, miners, reducers, regularizers


def mat_based(library: Any) -> Any:
    class MeanGap(library.GenericPairLoss):  # type: ignore[misc]
        def __init__(self, gap: float, **kwargs: Any) -> None:
            super().__init__(mat_based_loss=True, **kwargs)
            self.gap = gap

        def _compute_loss(self, mat: Tensor, pos_mask: Tensor, neg_mask: Tensor) -> Any:
            near = (mat * pos_mask).sum(1) / pos_mask.sum(1).clamp(min=1)
            far = (mat * neg_mask).sum(1) / neg_mask.sum(1).clamp(min=1)
            cost = torch.relu(near - far + self.gap)
            return {"loss": {"losses": cost, "indices": torch.arange(len(mat)), "reduction_type": "element"}}

    return MeanGap(0.5)


def pair_based(library: Any) -> Any:
    class Squares(library.GenericPairLoss):  # type: ignore[misc]
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(mat_based_loss=False, **kwargs)

        def _compute_loss(self, pos_pair: Tensor, neg_pair: Tensor, indices_tuple: Any) -> Any:
            a1, p, a2, n = indices_tuple
            return {
                "pos_loss": {"losses": pos_pair**2, "indices": (a1, p), "reduction_type": "pos_pair"},
                "neg_loss": {"losses": torch.relu(1 - neg_pair) ** 2, "indices": (a2, n), "reduction_type": "neg_pair"},
            }

        def _sub_loss_names(self) -> list[str]:
            return ["pos_loss", "neg_loss"]

        def get_default_reducer(self) -> Any:
            return (reducers if library is losses else pml_reducers).AvgNonZeroReducer()

    return Squares()


def from_nothing(library: Any) -> Any:
    class Lengths(library.BaseMetricLossFunction):  # type: ignore[misc]
        def compute_loss(
            self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
        ) -> Any:
            cost = embeddings.norm(dim=1) * (1 + labels) + ref_emb.mean()
            return {"loss": {"losses": cost, "indices": torch.arange(len(cost)), "reduction_type": "element"}}

    return Lengths()


def with_weights(library: Any) -> Any:
    """As PML's own losses of classes are written: the mixin first."""

    class Nearest(library.WeightRegularizerMixin, library.BaseMetricLossFunction):  # type: ignore[misc]
        def __init__(self, num_classes: int, embedding_size: int, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.W = torch.nn.Parameter(torch.empty(num_classes, embedding_size, dtype=torch.float64))
            self.weight_init_func(self.W)
            self.add_to_recordable_attributes(list_of_names=["num_classes"], is_stat=False)
            self.add_to_recordable_attributes(name="largest", is_stat=True)

        def compute_loss(
            self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Any, ref_labels: Any
        ) -> Any:
            cost = self.distance(embeddings, self.W)[torch.arange(len(labels)), labels]
            self.largest = cost.max().item()
            parts = {"loss": {"losses": cost, "indices": torch.arange(len(cost)), "reduction_type": "element"}}
            self.add_weight_regularization_to_loss_dict(parts, self.W)
            return parts

    mine = library is losses
    of_distances, of_reducers, of_regularizers = (
        (distances, reducers, regularizers) if mine else (pml_distances, pml_reducers, pml_regularizers)
    )
    return Nearest(
        4,
        6,
        weight_regularizer=of_regularizers.LpRegularizer(power=2),
        weight_reg_weight=0.3,
        weight_init_func=lambda w: torch.nn.init.constant_(w, 0.5),
        embedding_regularizer=of_regularizers.LpRegularizer(),
        distance=of_distances.LpDistance(power=2),
        reducer=of_reducers.SumReducer(),
        collect_stats=True,
    )


def batch(seed: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, 6, dtype=torch.float64, generator=generator)
    return rows, torch.randint(4, (size,), generator=generator)


def call(loss: Any, embeddings: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, *rest, **named)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


OWN = [mat_based, pair_based, from_nothing, with_weights]


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("how", ["by itself", "with references", "pairs of a miner"])
def test_a_loss_written_for_pml_is_the_same_here(own: Any, how: str) -> None:
    embeddings, labels = batch(0)
    rest: dict[str, Any] = {}
    if how == "with references":
        rest = dict(zip(("ref_emb", "ref_labels"), batch(1, 20)))
    if how == "pairs of a miner":
        rest = {"indices_tuple": miners.MultiSimilarityMiner()(embeddings, labels)}
    found, wanted = (call(own(library), embeddings, labels, **rest) for library in (losses, pml_losses))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_bases_bring_their_defaults_whatever_their_order() -> None:
    class Mine(losses.WeightRegularizerMixin, losses.BaseMetricLossFunction):
        compute_loss = None  # type: ignore[assignment]

    class Triplets(losses.WeightRegularizerMixin, losses.TripletMarginLoss):
        pass

    assert type(Mine().distance) is distances.LpDistance
    assert type(Mine().reducer) is reducers.MeanReducer
    made = Triplets(margin=0.3, weight_reg_weight=2.0)
    assert (made.margin, made.weight_reg_weight) == (0.3, 2.0)
    assert type(made.reducer) is type(losses.TripletMarginLoss().reducer)
    rows, labels = batch(0)
    assert torch.equal(made(rows, labels), losses.TripletMarginLoss(margin=0.3)(rows, labels))
    with pytest.raises(TypeError, match="distance must be a Distance, got 3"):
        Mine(distance=3)


def test_a_loss_written_for_pml_has_its_own_statistics() -> None:
    loss, theirs = with_weights(losses), with_weights(pml_losses)
    assert loss.largest == theirs.largest == 0
    for each in (loss, theirs):
        each(*batch(0))
    assert loss.largest == theirs.largest != 0
    loss.reset_stats()
    assert loss.largest == 0
    assert loss.num_classes == theirs.num_classes == 0


@pytest.mark.parametrize("own", OWN[:3])
def test_it_runs_in_a_queue(own: Any) -> None:
    """Against all of the queue, each anchor's own row left out: as with the same rows passed as references."""
    bank = losses.CrossBatchMemory(own(losses), 6, 32).double()
    first, second = batch(2), batch(3)
    bank(*first)
    found = call(bank, *second)
    rows, labels = (torch.cat(each) for each in zip(first, second))
    own_pair = torch.arange(16) + 16
    same = second[1][:, None] == labels
    a2, n = (~same).nonzero(as_tuple=True)
    same[torch.arange(16), own_pair] = False
    a1, p = same.nonzero(as_tuple=True)
    wanted = call(own(losses), *second, (a1, p, a2, n), ref_emb=rows, ref_labels=labels)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def median(library: Any) -> Any:
    class Median(library.BaseReducer):  # type: ignore[misc]
        def element_reduction(self, losses: Tensor, indices: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
            return losses.median()

        pos_pair_reduction = neg_pair_reduction = triplet_reduction = element_reduction

    return Median()


@pytest.mark.parametrize(
    "name", ["ContrastiveLoss", "NTXentLoss", "MultiSimilarityLoss", "TripletMarginLoss", "MarginLoss", "NCALoss"]
)
@pytest.mark.parametrize("listed", [False, True])
def test_a_reducer_written_for_pml_sees_every_loss(name: str, listed: bool) -> None:
    embeddings, labels = batch(4)
    rest = (miners.TripletMarginMiner()(embeddings, labels),) if listed else ()
    found, wanted = (
        call(getattr(library, name)(reducer=median(of)), embeddings, labels, *rest)
        for library, of in ((losses, reducers), (pml_losses, pml_reducers))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["ContrastiveLoss", "TripletMarginLoss", "SupConLoss", "LiftedStructureLoss"])
def test_a_reducer_that_does_nothing_gives_the_losses(name: str) -> None:
    embeddings, labels = batch(5)
    found = getattr(losses, name)(reducer=reducers.DoNothingReducer())(embeddings, labels)
    wanted = getattr(pml_losses, name)(reducer=pml_reducers.DoNothingReducer())(embeddings, labels)
    assert found.keys() == wanted.keys()
    for part, theirs in wanted.items():
        mine = found[part]
        assert mine["reduction_type"] == theirs["reduction_type"]
        for each in ("losses", "indices"):
            for a, b in zip(*(x[each] if isinstance(x[each], tuple) else (x[each],) for x in (mine, theirs))):
                torch.testing.assert_close(
                    a.flatten().sort().values, b.flatten().sort().values, rtol=1e-9, atol=1e-12, check_dtype=False
                )


def geometric(library: Any) -> Any:
    """Gives nothing where there is nothing, as PML's own reducers do; and a mean that minds how many zeros it sees."""

    class Geometric(library.BaseReducer):  # type: ignore[misc]
        def element_reduction(self, losses: Tensor, indices: Any, embeddings: Tensor, labels: Tensor) -> Tensor:
            some = losses[losses > 0]
            return some.log().mean().exp() if len(some) else self.zero_loss(embeddings)

    return library.PerAnchorReducer(Geometric(), aggregation_func=lambda table, _: table.softmax(1).amax(1))


@pytest.mark.parametrize("only", [4, 1], ids=["of four classes", "of one"])
def test_a_function_by_anchor_sees_the_zeros_that_it_sees_in_pml(only: int) -> None:
    embeddings, labels = batch(4)
    found, wanted = (
        call(library.ContrastiveLoss(reducer=geometric(of)), embeddings, labels % only)
        for library, of in ((losses, reducers), (pml_losses, pml_reducers))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@component
class OfTheMean(losses.BaseMetricLossFunction):
    """A user's own loss, small enough to hold the matrix: loss[a] = relu(scale * (mean_p d[a, p] - mean_n d[a, n]))."""

    scale: float = 1.0

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):  # type: ignore[no-untyped-def]
        mat = self.distance(embeddings, ref_emb)
        same = labels[:, None] == ref_labels
        gap = (mat * same).sum(1) / same.sum(1) - (mat * ~same).sum(1) / (~same).sum(1).clamp(min=1)
        cost = torch.relu(self.scale * gap)
        return {"loss": {"losses": cost, "indices": torch.arange(len(cost)), "reduction_type": "element"}}


def test_it_runs_on_a_server_that_knows_it(embedded: gradbank.Client, name: str) -> None:
    here = losses.CrossBatchMemory(OfTheMean(2.0), 6, 24)
    there = embedded.open(name, here.rebuilt())
    for seed in (6, 7, 8):
        rows, labels = batch(seed)
        found, wanted = call(there, rows.float(), labels), call(here, rows.float(), labels)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("TripletMarginLoss", "compute_loss"),
        ("NTXentLoss", "_compute_loss"),
        ("ArcFaceLoss", "modify_cosine_of_target_classes"),
        ("CosFaceLoss", "scale_logits"),
    ],
)
def test_an_override_that_nobody_would_call_is_refused(base: str, name: str) -> None:
    def override(self: Any, *_: Any) -> Any:
        return {}

    with pytest.raises(TypeError, match=rf"Mine overrides {name}, which {base} does not call: derive it from Generic"):
        type("Mine", (getattr(losses, base),), {name: override})
    whole = type("Mine", (getattr(losses, base),), {name: override, "forward": lambda self, *_: getattr(self, name)()})
    arguments = (2, 4) if "Face" in base else ()
    assert whole(*arguments)(torch.randn(4, 4), torch.arange(4) % 2) == {}


@pytest.mark.parametrize("loss", ["NTXentLoss", "ContrastiveLoss", "TripletMarginLoss", "CircleLoss"])
def test_a_reducer_of_elements_reduces_pairs_and_triplets_too(loss: str) -> None:
    def reduced(of_losses: Any, of_reducers: Any) -> Tensor:
        class SevenTimes(of_reducers.MeanReducer):  # type: ignore[misc]
            def element_reduction(self, losses: Tensor, *_: Any) -> Tensor:
                return 7 * losses.sum()

        torch.manual_seed(0)
        return getattr(of_losses, loss)(reducer=SevenTimes())(torch.randn(12, 6).double(), torch.arange(12) % 3)

    torch.testing.assert_close(reduced(losses, reducers), reduced(pml_losses, pml_reducers))
