"""MPerClassSampler, HierarchicalSampler and FixedSetOfTriplets: PML's batches, and who draws them."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_metric_learning.samplers as pml
import torch
from torch.utils.data import DataLoader, TensorDataset

from gradbank import samplers
from gradbank.samplers import FixedSetOfTriplets, HierarchicalSampler, MPerClassSampler

LABELS = np.random.default_rng(0).integers(0, 30, 600)
LEVELS = np.stack([LABELS, LABELS // 6], 1)

MADE: dict[str, Callable[..., Any]] = {
    "m per class": lambda m, **a: m.MPerClassSampler(LABELS, 4, length_before_new_iter=999, **a),
    "m per class, few": lambda m, **a: m.MPerClassSampler(LABELS.tolist(), 50, 100, 500, **a),
    "m per class, in batches": lambda m, **a: m.MPerClassSampler(torch.tensor(LABELS), 4, 20, 997, **a),
    "triplets": lambda m, **a: m.FixedSetOfTriplets(LABELS, 100, **a),
    "hierarchy": lambda m, **a: m.HierarchicalSampler(LEVELS, 20, 5, **a),
    "hierarchy of three": lambda m, **a: m.HierarchicalSampler(torch.tensor(LEVELS), 60, "all", 3, 3, **a),
    "hierarchy turned": lambda m, **a: m.HierarchicalSampler(LEVELS[:, ::-1], 20, 2, inner_label=1, outer_label=0, **a),
}


@pytest.fixture(autouse=True)
def _numpy_state() -> Any:
    """numpy's global generator is given back as it was found."""
    before = np.random.get_state()
    yield
    np.random.set_state(before)


@pytest.mark.parametrize("name", MADE)
def test_after_the_same_seed_batches_are_those_of_pml(name: str) -> None:
    epochs = []
    for module in (samplers, pml):
        np.random.seed(3)
        sampler = MADE[name](module)
        epochs.append([list(sampler), list(sampler), len(sampler)])
    assert epochs[0] == epochs[1]
    first, second, length = epochs[0]
    assert len(first) == length
    assert first != second


@pytest.mark.parametrize("name", MADE)
def test_a_generator_draws_alone(name: str) -> None:
    def epochs(seed: int) -> list[Any]:
        sampler = MADE[name](samplers, generator=torch.Generator().manual_seed(seed))
        return [list(sampler), list(sampler)]

    np.random.seed(1)
    first = epochs(seed=5)
    state = np.random.get_state()[1]
    np.random.seed(2)
    assert epochs(seed=5) == first
    assert epochs(seed=6) != first
    assert first[0] != first[1]
    np.random.seed(1)
    epochs(seed=5)
    assert np.array_equal(state, np.random.get_state()[1])


def test_torchs_own_generator_follows_manual_seed() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        drawn.append(list(MPerClassSampler(LABELS, 4, 20, 100, generator=torch.default_generator)))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("m", "batch_size", "length"), [(1, 4, 100), (5, 50, 999), (10, 100, 1000), (50, 100, 100)])
def test_every_batch_has_m_of_each_class_in_it(m: int, batch_size: int, length: int) -> None:
    sampler = MPerClassSampler(LABELS, m, batch_size, length)
    assert len(sampler) == length - length % batch_size
    loader = DataLoader(TensorDataset(torch.tensor(LABELS)), batch_size, sampler=sampler)
    batches = [Counter(labels.tolist()) for (labels,) in loader]
    assert len(batches) == length // batch_size
    for batch in batches:
        assert set(batch.values()) == {m}
        assert len(batch) == batch_size // m


def test_items_of_a_class_differ_while_there_are_enough() -> None:
    labels = [0] * 6 + [1] * 2
    for start in range(20):
        np.random.seed(start)
        items = list(MPerClassSampler(labels, 4, 8, 8))
        by_class = [items[:4], items[4:]] if labels[items[0]] == 0 else [items[4:], items[:4]]
        assert len(set(by_class[0])) == 4
        assert set(by_class[1]) <= {6, 7}


def test_labels_may_be_words() -> None:
    words = ["cat", "dog", "cat", "bird", "dog", "bird"]
    items = list(MPerClassSampler(words, 2, 4, 40))
    assert all(words[a] == words[b] for a, b in zip(items[::2], items[1::2]))


@pytest.mark.parametrize(
    "labels",
    [
        [(0, 1), (1, 0), (0, 1), (1, 0), (2, 2), (2, 2)],
        [None, "a", None, "a", "b", "b"],
        [1, "1", 1, "1", 2, 2],
        [torch.tensor(4), torch.tensor(5), np.int64(4), torch.tensor(5), 6, 6],
    ],
    ids=["tuples", "None", "mixed", "scalars"],
)
def test_labels_may_be_whatever_can_be_compared(labels: list[Any]) -> None:
    sampler = MPerClassSampler(labels, 2, 6, 60)
    assert sorted(map(list, sampler.labels_to_indices.values())) == [[0, 2], [1, 3], [4, 5]]
    assert all(labels[a] == labels[b] for a, b in np.array(list(sampler)).reshape(-1, 2))


def test_the_length_is_what_an_epoch_yields() -> None:
    """PML yields one whole pass here, of 150 items, and says 100."""
    sampler = MPerClassSampler(LABELS, 5, length_before_new_iter=100)
    assert len(sampler) == len(list(sampler)) == 150
    theirs = pml.MPerClassSampler(LABELS, 5, length_before_new_iter=100)
    assert (len(theirs), len(list(theirs))) == (100, 150)


def test_a_hierarchical_batch_has_equal_parts_of_its_super_classes() -> None:
    sampler = HierarchicalSampler(LEVELS, 20, 5, batches_per_super_tuple=3)
    assert len(sampler) == 3 * math.comb(5, 2)
    pairs: Counter[tuple[int, ...]] = Counter()
    for batch in sampler:
        within = Counter(LEVELS[batch, 1].tolist())
        assert set(within.values()) == {10}
        assert set(Counter(LEVELS[batch, 0].tolist()).values()) == {5}
        pairs[tuple(sorted(within))] += 1
    assert len(pairs) == math.comb(5, 2)
    assert set(pairs.values()) == {3}


def test_whole_classes_are_taken_as_long_as_they_fit() -> None:
    sizes = Counter(LABELS.tolist())
    for batch in HierarchicalSampler(LEVELS, 100, "all"):
        taken = Counter(LABELS[batch].tolist())
        assert all(sizes[label] == number for label, number in taken.items())
        assert max(Counter(LEVELS[batch, 1].tolist()).values()) <= 50


def test_a_part_of_too_few_classes_stays_short() -> None:
    levels = [[0, 0]] * 5 + [[1, 1]] * 5
    for batch in HierarchicalSampler(levels, 8, 2):
        assert len(batch) == 4


def test_hierarchical_batches_are_a_loaders_batches() -> None:
    loader = DataLoader(TensorDataset(torch.tensor(LABELS)), batch_sampler=HierarchicalSampler(LEVELS, 20, 5))
    assert [len(labels) for (labels,) in loader] == [20] * len(loader)


def test_triplets_are_anchor_positive_and_negative() -> None:
    sampler = FixedSetOfTriplets(torch.tensor(LABELS), 50)
    assert len(sampler) == 150
    epochs = [np.array(list(sampler)).reshape(50, 3) for _ in range(2)]
    for a, p, n in epochs[0].tolist():
        assert LABELS[a] == LABELS[p] != LABELS[n]
        assert a != p
    assert not np.array_equal(epochs[0], epochs[1])
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist())


def test_a_lone_anchor_is_its_own_positive() -> None:
    for a, p, n in np.array(list(FixedSetOfTriplets([0, 1], 10))).reshape(10, 3).tolist():
        assert a == p != n


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: MPerClassSampler(LABELS, 0), "m must be at least 1"),
        (lambda: MPerClassSampler(LABELS, 3, 20), "multiple of m=3, got 20"),
        (lambda: MPerClassSampler(LABELS, 2, 62), r"at most m \* classes = 2 \* 30, got 62"),
        (lambda: MPerClassSampler(LABELS, 2, 20, 19), "at least batch_size=20, got 19"),
        (lambda: MPerClassSampler([], 2), "one or more, got shape"),
        (lambda: MPerClassSampler(LEVELS, 2), "must be .items,."),
        (lambda: MPerClassSampler([torch.tensor([1]), torch.tensor([1])], 2), r"names, got tensor\(\[1\]\) of item 0"),
        (lambda: MPerClassSampler(LEVELS.tolist(), 2), r"must be .items,., numbers or names, got \[25, 4\] of item 0"),
        (lambda: HierarchicalSampler(LABELS, 20, 5), "must be .items, levels."),
        (lambda: HierarchicalSampler(LEVELS, 21, 5), "super_classes_per_batch=2, got 21"),
        (lambda: HierarchicalSampler(LEVELS, 20, 3), "divide the 10 items .* got 3"),
        (lambda: HierarchicalSampler(LEVELS, 20, 0), "divide the 10 items .* got 0"),
        (lambda: HierarchicalSampler(LEVELS, 24, 2, super_classes_per_batch=6), "5 super classes, too few"),
        (lambda: FixedSetOfTriplets(LABELS, 0), "num_triplets must be at least 1"),
        (lambda: FixedSetOfTriplets([1, 1, 1], 5), "two classes at least"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(made: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        made()
    assert isinstance(caught.value, AssertionError)  # which PML raises


def test_a_sampler_of_ones_own_knows_how_often_classes_are_drawn() -> None:
    for batch_size, length in ((None, 100), (8, 100), (8, 8), (None, 1)):
        ours = MPerClassSampler([0, 1, 2, 3, 4, 5] * 10, 2, batch_size, max(length, batch_size or 1))
        theirs = pml.MPerClassSampler([0, 1, 2, 3, 4, 5] * 10, 2, batch_size, max(length, batch_size or 1))
        assert ours.calculate_num_iters() == theirs.calculate_num_iters()
