"""Where gradbank differs from PML on purpose: each row of the table in docs/losses.md, shown."""

import math

import pytest
import torch
from pytorch_metric_learning import distances as pml_distances
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning import reducers as pml_reducers
from torch import Tensor

from gradbank import distances, losses, reducers
from gradbank.errors import NonFiniteError


def unit(*degrees: float) -> Tensor:
    """Points on the circle."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_ntxent_has_no_ceiling_and_keeps_its_gradient() -> None:
    one_positive = tuple(torch.tensor(i) for i in ([0], [1], [0, 0], [2, 3]))
    here, there = (unit(0, 170, 10, 20).requires_grad_() for _ in range(2))
    loss = losses.NTXentLoss(temperature=0.01)(here, None, one_positive)
    loss.backward()
    s = [math.cos(math.radians(angle)) / 0.01 for angle in (0, 170, 10, 20)]
    assert loss.item() == pytest.approx(s[2] - s[1] + math.log1p(math.exp(s[3] - s[2])), rel=1e-5)
    capped = pml.NTXentLoss(temperature=0.01)(there, None, one_positive)
    capped.backward()
    assert capped.item() == pytest.approx(87.3, abs=0.1)
    assert there.grad is not None
    assert here.grad is not None
    assert float(there.grad.abs().max()) == 0 < float(here.grad.abs().max())


def test_supcon_without_negatives_is_the_papers_formula() -> None:
    embeddings, labels = unit(0, 40, 90), torch.zeros(3, dtype=torch.long)
    s = (embeddings @ embeddings.T / 0.1).tolist()
    rows = []
    for a in range(3):
        others = [b for b in range(3) if b != a]
        total = math.log(sum(math.exp(s[a][b]) for b in others))
        rows.append(sum(total - s[a][p] for p in others) / len(others))
    assert losses.SupConLoss()(embeddings, labels).item() == pytest.approx(sum(rows) / 3, rel=1e-5)
    assert pml.SupConLoss()(embeddings, labels).item() == 0


def test_one_pair_of_each_kind_counts() -> None:
    embeddings = unit(0, 40, 90)
    one = tuple(torch.tensor([i]) for i in (0, 1, 0, 2))
    near, far = (float((embeddings[0] - embeddings[i]).norm()) for i in (1, 2))
    expected = near + max(0.0, 1 - far)
    assert losses.ContrastiveLoss()(embeddings, indices_tuple=one).item() == pytest.approx(expected, rel=1e-5)
    assert pml.ContrastiveLoss()(embeddings, indices_tuple=one).item() == 0


def test_indices_mean_rows_of_the_batch_wherever_they_entered_the_queue() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(4, 8), torch.randn(4, 8)
    distinct = torch.arange(4)
    named = tuple(torch.tensor(i) for i in ([0, 1], [2, 3], [0], [3]))
    bank = losses.CrossBatchMemory(losses.ContrastiveLoss(), 8, memory_size=8)
    bank(first, distinct)
    loss = bank(second, distinct + 4, named)
    # every pair that the labels make is negative, and the named ones come on top
    plain = losses.ContrastiveLoss()
    references = torch.cat([first, second])
    a1, p, a2, n = named
    everyone = torch.cartesian_prod(torch.arange(4), torch.arange(8)).T
    keep = everyone[1] != everyone[0] + 4  # not its own copy
    asked = (a1, p + 4, torch.cat([everyone[0][keep], a2]), torch.cat([everyone[1][keep], n + 4]))
    torch.testing.assert_close(loss, plain(second, None, asked, references))


def test_a_mask_that_enqueues_nothing_does_not_fill_the_queue() -> None:
    ours = losses.CrossBatchMemory(losses.ContrastiveLoss(), 2, memory_size=4)
    theirs = pml.CrossBatchMemory(pml.ContrastiveLoss(), 2, memory_size=4)
    nothing = torch.zeros(3, dtype=torch.bool)
    for bank in (ours, theirs):
        bank(unit(0, 40, 90), torch.arange(3), enqueue_mask=nothing)
    assert len(ours) == 0
    assert not ours.has_been_filled
    assert theirs.has_been_filled


def test_more_rows_than_slots_are_refused() -> None:
    bank = losses.CrossBatchMemory(losses.ContrastiveLoss(), 2, memory_size=2)
    with pytest.raises(ValueError, match="3 rows do not fit a memory of 2"):
        bank(unit(0, 1, 2, 3), torch.arange(4), enqueue_mask=torch.tensor([True, True, True, False]))
    assert len(bank) == 0


def test_a_batch_of_one_is_not_its_own_positive() -> None:
    ours = losses.CrossBatchMemory(losses.MultiSimilarityLoss(), 2, memory_size=4)
    theirs = pml.CrossBatchMemory(pml.MultiSimilarityLoss(), 2, memory_size=4)
    for bank in (ours, theirs):
        bank(unit(0, 90), torch.tensor([0, 1]))
    one, label = unit(0), torch.tensor([2])
    # label 2 has no positive but itself, so the paper's sum over positives is empty
    truth = math.log1p(sum(math.exp(50 * (math.cos(math.radians(angle)) - 0.5)) for angle in (0, 90))) / 50
    assert ours(one, label).item() == pytest.approx(truth, rel=1e-5)
    assert theirs(one, label).item() != pytest.approx(truth, rel=1e-2)


def test_a_half_batch_leaves_the_queue_in_float32() -> None:
    ours = losses.CrossBatchMemory(losses.ContrastiveLoss(), 2, memory_size=8)
    theirs = pml.CrossBatchMemory(pml.ContrastiveLoss(), 2, memory_size=8)
    for bank in (ours, theirs):
        bank(unit(0, 90, 45), torch.tensor([0, 1, 1]))
        bank(unit(10, 80, 20).bfloat16() if bank is ours else unit(10, 80, 20).double(), torch.tensor([0, 1, 1]))
    assert ours.embedding_memory.dtype == torch.float32
    assert theirs.embedding_memory.dtype == torch.float64


def test_nan_is_refused_and_the_queue_is_as_it_was() -> None:
    bank = losses.CrossBatchMemory(losses.ContrastiveLoss(), 2, memory_size=4)
    bank(unit(0, 90), torch.tensor([0, 1]))
    before = bank.embedding_memory.clone()
    bad = unit(5, 50)
    bad[1, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"row 1 is not finite \(1 of 2 rows"):
        bank(bad, torch.tensor([0, 1]))
    assert torch.equal(bank.embedding_memory, before)
    assert len(bank) == 2


def test_a_restored_queue_goes_on_where_it_was() -> None:
    ours = losses.CrossBatchMemory(losses.ContrastiveLoss(), 2, memory_size=6)
    theirs = pml.CrossBatchMemory(pml.ContrastiveLoss(), 2, memory_size=6)
    restored = losses.CrossBatchMemory(losses.ContrastiveLoss(), 2, memory_size=6)
    forgotten = pml.CrossBatchMemory(pml.ContrastiveLoss(), 2, memory_size=6)
    labels = torch.tensor([0, 1, 0])
    for bank in (ours, theirs):
        bank(unit(0, 90, 10), labels)
    restored.load_state_dict(ours.state_dict())
    forgotten.load_state_dict(theirs.state_dict())
    batch = unit(20, 70, 30)
    assert restored(batch, labels).item() == ours(batch, labels).item()
    assert forgotten(batch, labels).item() != theirs(batch, labels).item()


def test_a_subclass_of_a_loss_is_welcome_in_a_queue() -> None:
    ours, theirs = type("Mine", (losses.ContrastiveLoss,), {}), type("Mine", (pml.ContrastiveLoss,), {})
    labels = torch.tensor([0, 0, 1])
    value = losses.CrossBatchMemory(ours(), 2, memory_size=4)(unit(0, 40, 90), labels)
    assert value == losses.CrossBatchMemory(losses.ContrastiveLoss(), 2, memory_size=4)(unit(0, 40, 90), labels)
    with pytest.raises(Exception, match="not supported"):
        pml.CrossBatchMemory(theirs(), 2, memory_size=4)


def test_arcface_is_finite_along_the_class_weight() -> None:
    ours, theirs = losses.ArcFaceLoss(3, 4), pml.ArcFaceLoss(3, 4)
    for loss_fn, finite in ((ours, True), (theirs, False)):
        with torch.no_grad():
            loss_fn.W.copy_(torch.eye(4)[:, :3])
        embedding = torch.tensor([[1.0, 0.0, 0.0, 0.0]], requires_grad=True)
        loss_fn(embedding, torch.tensor([0])).backward()
        assert embedding.grad is not None
        assert bool(embedding.grad.isfinite().all()) is finite


def test_a_loss_that_pml_rounds_to_zero_counts_as_one_above_zero() -> None:
    embeddings, labels = unit(0, 1, 179, 180, 90), torch.tensor([0, 0, 1, 1, 2])
    mine, theirs = (
        library.NTXentLoss(temperature=0.05, reducer=of.AvgNonZeroReducer())(embeddings, labels)
        for library, of in ((losses, reducers), (pml, pml_reducers))
    )
    assert 0 < float(mine) < 1e-8
    assert float(theirs) == 0


@pytest.mark.parametrize(
    "name",
    [
        *("AngularLoss", "CircleLoss", "GeneralizedLiftedStructureLoss", "LiftedStructureLoss"),
        *("MultiSimilarityLoss", "TupletMarginLoss"),
    ],
)
def test_losses_that_nobody_reduced_lie_in_a_row(name: str) -> None:
    embeddings, labels = unit(0, 30, 100, 200, 220), torch.tensor([0, 0, 0, 1, 1])
    here, there = (
        getattr(library, name)(reducer=of.DoNothingReducer())(embeddings, labels)["loss"]["losses"]
        for library, of in ((losses, reducers), (pml, pml_reducers))
    )
    assert here.shape == (len(there),)
    assert there.shape == (len(there), 1)


@pytest.mark.parametrize("name", ["ContrastiveLoss", "MultiSimilarityLoss", "GeneralizedLiftedStructureLoss"])
def test_two_views_of_one_sample_are_a_pair_too(name: str) -> None:
    one, other = unit(0), unit(40)
    here, there = (
        float(library.SelfSupervisedLoss(getattr(library, name)(), symmetric=False)(one, other))
        for library in (losses, pml)
    )
    assert there == 0 < here


def test_nca_counts_an_anchor_far_from_its_class() -> None:
    rows, labels = torch.tensor([[0.0, 0.0], [12.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0, 1, 1])
    here, there = (
        float(library.NCALoss(distance=of.LpDistance(normalize_embeddings=False, power=2))(rows, labels))
        for library, of in ((losses, distances), (pml, pml_distances))
    )
    d = torch.cdist(rows, rows).square().double()
    shares = [torch.logsumexp(-d[a, d[a] > 0], 0) + d[a, p] for a, p in ((0, 1), (1, 0), (2, 3), (3, 2))]
    assert here == pytest.approx(float(torch.stack(shares).mean()), rel=1e-5)
    assert there < 1 < here


def test_proxy_anchor_weighs_by_the_class() -> None:
    rows, labels = unit(0, 20, 200, 220), torch.tensor([2, 2, 3, 3])
    weights = torch.tensor([0.0, 1.0, 2.0, 4.0])
    torch.manual_seed(0)
    here = losses.ProxyAnchorLoss(4, 2, reducer=reducers.ClassWeightedReducer(weights))
    there = pml.ProxyAnchorLoss(4, 2, reducer=pml_reducers.ClassWeightedReducer(weights))
    plain = pml.ProxyAnchorLoss(4, 2, reducer=pml_reducers.DoNothingReducer())
    for loss in (there, plain):
        loss.proxies.data.copy_(here.proxies.data)
    costs = [part["losses"].detach() for part in plain(rows, labels).values()]  # of each class
    wanted = sum(float((cost * weights).mean()) for cost in costs)
    assert float(here(rows, labels).detach()) == pytest.approx(wanted, rel=1e-4)
    assert float(there(rows, labels).detach()) != pytest.approx(wanted, rel=1e-2)


def test_nca_of_one_anchor_is_the_formula() -> None:
    anchor, references = unit(0), unit(40, 90, 100)
    d = [2 - 2 * math.cos(math.radians(angle)) for angle in (40, 90, 100)]
    wanted = -math.log(math.exp(-d[0]) / sum(math.exp(-each) for each in d))
    given = (anchor, torch.tensor([0]), None, references, torch.tensor([0, 1, 2]))
    assert losses.NCALoss(softmax_scale=1)(*given).item() == pytest.approx(wanted, rel=1e-5)
    assert pml.NCALoss(softmax_scale=1)(*given).item() == 0


def test_a_consistent_margin_is_of_the_distance_that_the_loss_has() -> None:
    batch = (unit(0, 20, 50, 100), torch.tensor([0, 0, 1, 1]))
    by_power = [
        [m.ThresholdConsistentMarginLoss(distance=d.CosineSimilarity(power=power))(*batch).item() for power in (1, 2)]
        for m, d in ((losses, distances), (pml, pml_distances))
    ]
    assert by_power[0][0] == pytest.approx(by_power[1][0])
    assert by_power[1][0] == by_power[1][1], "PML compares cosines"
    squared = torch.tensor([math.cos(math.radians(a - b)) ** 2 for a in (0, 20) for b in (50, 100)] * 2)
    near = torch.tensor([math.cos(math.radians(angle)) ** 2 for angle in (20, 20, 50, 50)])
    short, far = near[near < 0.9], squared[squared > 0.5]
    wanted = (0.9 - short).sum() / len(short) + (far - 0.5).sum() / len(far)
    assert by_power[0][1] == pytest.approx(float(wanted), rel=1e-5)
