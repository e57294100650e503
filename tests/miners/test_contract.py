"""What every miner answers to: the constructor, the call, a queue's `select`, and miners of one's own."""

import inspect
from typing import Any

import pytest
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.miners as pml_miners
import torch
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from gradbank import distances, losses, miners
from gradbank.arguments import argument_names
from gradbank.engine import LabelledPairs, Pairs, References, every_pair

NAMES = [name for name in dir(pml_miners) if name.endswith("Miner") and name != "BaseMiner"]
NAMES.append("EmbeddingsAlreadyPackagedAsTriplets")


def batch(rows: int = 12, dimension: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, dimension), torch.randint(3, (rows,))


def listed(found: Any) -> list[list[int]]:
    return [each.tolist() for each in found]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_those_of_pml(name: str) -> None:
    theirs = [
        each for each in inspect.signature(getattr(pml_miners, name)).parameters.values() if each.name != "kwargs"
    ]
    ours = inspect.signature(getattr(miners, name)).parameters
    assert list(ours)[: len(theirs)] == [each.name for each in theirs]
    assert [ours[each.name].default for each in theirs] == [each.default for each in theirs]
    made = getattr(miners, name)(distance=None, collect_stats=None)
    assert type(made.distance) is type(getattr(miners, name)().distance)
    assert made.collect_stats is None
    assert isinstance(made, miners.BaseMiner)
    assert {"distance", "collect_stats"} <= set(argument_names(type(made)))


def test_strategies_have_the_names_of_pml() -> None:
    ours, theirs = miners.BatchEasyHardMiner, pml_miners.BatchEasyHardMiner
    for name in ("HARD", "SEMIHARD", "EASY", "ALL"):
        assert getattr(ours, name) == getattr(theirs, name)
        assert getattr(miners.BatchHardMiner(), name) == getattr(theirs, name)


@pytest.mark.parametrize(
    "arguments",
    [
        {"pos_strategy": "soft"},
        {"pos_strategy": "semihard"},
        {"pos_strategy": "all"},
        {"pos_strategy": "semihard", "neg_strategy": "all"},
        {"allowed_pos_range": [1.0]},
    ],
    ids=str,
)
def test_strategies_that_do_not_go_together_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        miners.BatchEasyHardMiner(**arguments)


@pytest.mark.parametrize("name", ["AngularMiner", "DistanceWeightedMiner"])
@pytest.mark.parametrize(
    "distance",
    [
        distances.CosineSimilarity(),
        distances.LpDistance(p=1),
        distances.LpDistance(power=2),
        distances.LpDistance(normalize_embeddings=False),
    ],
    ids=lambda d: d.extra_repr(),
)
def test_miners_of_the_unit_sphere_refuse_other_distances(name: str, distance: distances.Distance) -> None:
    with pytest.raises(ValueError, match=rf"{name} works on LpDistance\(True, p=2, power=1\) only, got"):
        getattr(miners, name)(distance=distance)


def test_packaged_triplets_are_taken_as_they_lie() -> None:
    found = miners.EmbeddingsAlreadyPackagedAsTriplets()(*batch(9))
    assert listed(found) == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    with pytest.raises(ValueError, match="three rows each, got 10 rows"):
        miners.EmbeddingsAlreadyPackagedAsTriplets()(*batch(10))


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_written_at_each_call(name: str) -> None:
    miner = getattr(miners, name)()
    for rows in (12, 24):
        found = miner(*batch(rows))
        sizes = (0, 0, len(found[0])) if len(found) == 3 else (len(found[0]), len(found[2]), 0)
        assert (miner.num_pos_pairs, miner.num_neg_pairs, miner.num_triplets) == sizes
        assert sum(sizes) > 0


@pytest.mark.parametrize("name", NAMES)
def test_mining_takes_no_gradient_and_widens_half_precision(name: str) -> None:
    embeddings, labels = batch()
    miner, half = getattr(miners, name)(), embeddings.bfloat16().requires_grad_()
    torch.manual_seed(1)
    found = miner(half, labels)
    torch.manual_seed(1)
    assert listed(found) == listed(miner(half.detach().float(), labels))
    torch.manual_seed(1)
    assert listed(found) == listed(miner.mine(half, labels, half, labels))
    assert half.grad is None


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("Miner")])
@pytest.mark.parametrize("rows", [(0, 0), (0, 3), (3, 0)], ids=str)
def test_without_rows_nothing_is_mined(name: str, rows: tuple[int, int]) -> None:
    for collect in (False, True):
        found = getattr(miners, name)(collect_stats=collect)(
            *batch(rows[0]), *(() if rows == (0, 0) else batch(rows[1]))
        )
        assert {(len(each), each.dtype) for each in found} == {(0, torch.int64)}


@pytest.mark.parametrize("name", NAMES)
def test_block_of_one_row_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = name in ("DistanceWeightedMiner", "UniformHistogramMiner")
    embeddings, labels = batch(12)
    miner = getattr(miners, name)(collect_stats=True)
    before, stats = miner(embeddings.double(), labels), {k: v for k, v in vars(miner).items() if isinstance(v, float)}
    for module in ("rows", "angular"):
        monkeypatch.setattr(f"gradbank.miners.{module}.ENTRIES", 1)
    after = miner(embeddings.double(), labels)
    assert [len(each) for each in before] == [len(each) for each in after]
    if not drawn:
        assert listed(before) == listed(after)
        assert {key: getattr(miner, key) for key in stats} == pytest.approx(stats)


@pytest.mark.parametrize("name", NAMES)
def test_queue_gets_what_a_call_lists(name: str) -> None:
    embeddings, labels = batch(12)
    references, known = (torch.cat([x, y]) for x, y in zip(batch(12), (torch.randn(9, 4), torch.randint(3, (9,)))))
    miner = getattr(miners, name)()
    torch.manual_seed(1)
    wanted = miner(embeddings, labels, references, known)
    torch.manual_seed(1)
    rows = References((references[:5], references[5:]), known)
    found = miner.select(embeddings, rows, LabelledPairs(labels, known))
    if isinstance(found, Pairs):
        found = tuple(every_pair(found, len(embeddings), rows))
    split = (slice(0, 3),) if len(wanted) == 3 else (slice(0, 2), slice(2, 4))
    for part in split:
        assert set(zip(*listed(found[part]))) == set(zip(*listed(wanted[part])))


def test_hardest_pairs_come_first() -> None:
    embeddings, labels = torch.arange(6.0)[:, None], torch.tensor([0, 0, 1, 1, 1, 0])
    a1, p, a2, n = miners.HDCMiner(0.3, distance=distances.LpDistance(normalize_embeddings=False))(embeddings, labels)
    assert (a1 - p).abs().tolist() == [5, 5, 4, 4]
    assert (a2 - n).abs().tolist() == [1, 1, 1, 1, 2, 2]


def test_pairs_set_from_outside_are_filtered_until_they_are_reset() -> None:
    embeddings, labels = batch(20)
    ours, theirs = miners.HDCMiner(0.5), pml_miners.HDCMiner(0.5)
    outside = miners.TripletMarginMiner(0.1)(embeddings, labels)
    for miner in (ours, theirs):
        miner.set_idx_externally(outside, labels)
        assert miner.was_set_externally
    for _ in range(3):  # each call takes half of what the last one took
        assert listed(ours(embeddings, labels)) == listed(theirs(embeddings, labels))
    assert ours.num_pos_pairs == len(ours.a1) == -(-len(outside[0]) // 8)
    for miner in (ours, theirs):
        miner.set_idx_externally(None, labels)
    assert listed(ours(embeddings, labels)) == listed(theirs(embeddings, labels))
    for miner in (ours, theirs):
        miner.reset_idx()
        assert miner.a1 is None
    assert listed(ours(embeddings, labels)) == listed(theirs(embeddings, labels))
    ours.set_idx_externally((torch.tensor([20]), torch.tensor([0]), torch.tensor([0]), torch.tensor([1])), labels)
    with pytest.raises(ValueError, match=r"names anchors 20 to 20, but must stay within 0\.\.19"):
        ours(embeddings, labels)
    with pytest.raises(ValueError, match=r"share between 0 and 1, got 1\.5"):
        miners.HDCMiner(1.5)


class FarPositives(miners.BaseMiner):
    """Written as PML's documentation has it: no dataclass, and the labels' identity says which rows are the same."""

    def __init__(self, margin: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.margin = margin

    def get_default_distance(self) -> distances.Distance:
        return distances.CosineSimilarity()

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> tuple[Tensor, ...]:
        mat = self.distance(embeddings, ref_emb)
        same = labels[:, None] == ref_labels
        negatives = ~same
        if ref_labels is labels:
            same.fill_diagonal_(False)
        return *torch.where(same & (mat < self.margin)), *torch.where(negatives)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_miner_of_ones_own_gets_what_it_is_called_with(dtype: torch.dtype) -> None:
    class Alike(miners.BaseMiner):
        def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
            assert embeddings.dtype == ref_emb.dtype == dtype
            near = embeddings @ ref_emb.T > 0
            same = labels[:, None] == ref_labels
            return *(near & same).nonzero(as_tuple=True), *(near & ~same).nonzero(as_tuple=True)

    embeddings, labels = batch(12)
    assert len(Alike()(embeddings.to(dtype), labels, embeddings.to(dtype), labels.clone())[0]) >= 12


def test_pair_miner_of_ones_own_may_list() -> None:
    class Lists(miners.MultiSimilarityMiner):
        def select(self, embeddings: Tensor, references: References, pairs: LabelledPairs) -> Any:
            return miners.BaseMiner.select(self, embeddings, references, pairs)

        def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> Any:
            return *(labels[:, None] == ref_labels).nonzero(as_tuple=True), *(2 * [labels[:0]])

    miner = Lists(collect_stats=True)
    losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 32, miner)(*batch(12))
    assert miner.num_pos_pairs > 0


def test_miner_of_ones_own_is_called_and_put_before_a_queue() -> None:
    embeddings, labels = batch(12)
    miner = FarPositives(0.4, collect_stats=True)
    assert isinstance(miner.distance, distances.CosineSimilarity)
    a1, p, a2, n = miner(embeddings, labels)
    assert (miner.num_pos_pairs, miner.num_neg_pairs) == (len(a1), len(a2))
    assert bool((a1 != p).all())
    d = distances.CosineSimilarity()(embeddings)
    assert 0 < len(a1) < int((labels[:, None] == labels).sum()) - 12
    assert float(d[a1, p].max()) < 0.4
    queue = losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, 12, miner=miner)
    assert torch.isclose(queue(embeddings, labels), losses.ContrastiveLoss()(embeddings, labels, (a1, p, a2, n)))


def test_miner_that_returns_something_else_is_told_so() -> None:
    class Odd(miners.Miner):
        answer: tuple[Tensor, ...]

        def mine(self, *given: Tensor) -> tuple[Tensor, ...]:
            return self.answer

    miner = Odd()
    one, two = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    for answer, error in (((one, one), TypeError), ((one, one, two), ValueError), ((one, two, one, one), ValueError)):
        miner.answer = answer
        with pytest.raises(error, match=r"Odd\.mine must return"):
            miner(*batch())
    with pytest.raises(NotImplementedError, match="Miner must define mine"):
        miners.Miner()(*batch())


def test_references_that_do_not_fit_are_refused() -> None:
    embeddings, labels = batch(5)
    miner = miners.PairMarginMiner()
    with pytest.raises(ValueError, match=r"ref_labels must be \(7,\), one per row of ref_emb"):
        miner(embeddings, labels, torch.randn(7, 4))
    with pytest.raises(ValueError, match=r"ref_labels must be \(7,\), one per row of ref_emb"):
        miner(embeddings, labels, torch.randn(7, 4), torch.zeros(6))
    with pytest.raises(ValueError, match="the same dimension, got 4 and 3"):
        miner(embeddings, labels, torch.randn(7, 3), torch.zeros(7))


@pytest.mark.parametrize("method", ["mine", "forward"])
@pytest.mark.parametrize("base", ["MultiSimilarityMiner", "PairMarginMiner", "TripletMarginMiner", "BatchHardMiner"])
@pytest.mark.parametrize("loss", ["ContrastiveLoss", "TripletMarginLoss"])
def test_what_a_subclass_changes_counts_in_a_queue(loss: str, base: str, method: str) -> None:
    def stepped(of_losses: Any, of_miners: Any) -> Tensor:
        class Few(getattr(of_miners, base)):  # type: ignore[misc]
            pass

        def few(self: Any, *given: Any, **named: Any) -> Any:
            found = getattr(super(Few, self), method)(*given, **named)
            groups = [found] if len(found) == 3 else [found[:2], found[2:]]
            return tuple(index[group[0] < 4] for group in groups for index in group)  # the first anchors'

        setattr(Few, method, few)
        queue = of_losses.CrossBatchMemory(getattr(of_losses, loss)(), 4, 32, miner=Few())
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            made = queue(torch.randn(12, 4, generator=generator).double(), torch.arange(12) % 3)
        return made

    torch.testing.assert_close(stepped(losses, miners), stepped(pml_losses, pml_miners))


def test_miner_without_labels_says_that_it_needs_them() -> None:
    with pytest.raises(ValueError, match="BatchHardMiner needs labels"):
        miners.BatchHardMiner()(batch()[0], None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="embeddings must be a tensor, got None"):
        losses.NTXentLoss()(None, batch()[1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("base", "name"),
    [
        *(("HDCMiner", "should_select_largest"), ("BatchEasyHardMiner", "get_max_per_row")),
        *(("UniformHistogramMiner", "get_bins"), ("PairMarginMiner", "set_stats")),
    ],
)
def test_an_override_that_nobody_would_call_is_refused(base: str, name: str) -> None:
    override = {name: lambda self, *_: None}
    with pytest.raises(TypeError, match=rf"Mine overrides {name}, which {base} does not call: override mine"):
        type("Mine", (getattr(miners, base),), override)
    type("Mine", (getattr(miners, base),), {**override, "mine": lambda self, *_: getattr(self, name)()})
    type("Mine", (miners.BaseMiner,), override)


def test_what_a_miner_gives_may_be_looked_at() -> None:
    class Looking(miners.TripletMarginMiner):
        def output_assertion(self, chosen: Any) -> None:
            super().output_assertion(chosen)
            self.seen = len(chosen)

    miner = Looking(margin=10)
    miner(*batch())
    assert miner.seen == 3
    assert miner.num_triplets > 0


@pytest.mark.parametrize("classes", [1, 3, 50])
def test_every_pair_and_triplet_is_listed_as_in_pml(classes: int) -> None:
    torch.manual_seed(0)
    labels, ref_labels = torch.randint(classes, (14,)), torch.randint(classes, (9,))
    for given in ((labels,), (labels, labels), (labels, ref_labels), (labels[:0],), (labels, labels[:0])):
        for name in ("get_all_pairs_indices", "get_all_triplets_indices"):
            assert listed(getattr(miners, name)(*given)) == listed(getattr(lmu, name)(*given))
