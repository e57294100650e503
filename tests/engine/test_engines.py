"""Engines that agree: whole or in tiles, of whatever size, in whatever order the batch comes."""

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from gradbank import engine, losses, miners
from gradbank.engine import Bounds

few_examples = hypothesis.settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],  # `recipes` is a constant
)

Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@st.composite
def inputs(draw: st.DrawFn, smallest: int = 0) -> Inputs:
    """A batch, perhaps with references of its own; some rows are copies of others."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dimension, classes = draw(st.integers(2, 5)), draw(st.integers(1, 5))

    def rows(number: int) -> tuple[Tensor, Tensor]:
        made = torch.randn(number, dimension, generator=generator, dtype=torch.float64)
        for copy, original in draw(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=3)):
            if number:
                made[copy % number] = made[original % number]
        return made * 0.5, torch.randint(classes, (number,), generator=generator)

    embeddings, labels = rows(draw(st.integers(smallest, 14)))
    ref_emb, ref_labels = rows(draw(st.integers(0, 20))) if draw(st.booleans()) else (None, None)
    return embeddings, labels, ref_emb, ref_labels


bounds = st.builds(Bounds, tile=st.integers(1, 60), rows=st.integers(1, 16), positives=st.integers(1, 40))


def answer(loss: Any, inputs: Inputs, indices: Any = None) -> list[Tensor]:
    """The value and each gradient."""
    embeddings, labels, ref_emb, ref_labels = inputs
    leaf = embeddings.clone().requires_grad_()
    ref_leaf = None if ref_emb is None else ref_emb.clone().requires_grad_()
    value = loss(leaf, labels, indices, ref_leaf, ref_labels)
    value.backward()
    return [value.detach(), *(each.grad for each in (leaf, ref_leaf) if each is not None)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for mine, other in zip(found, wanted, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


@few_examples
@hypothesis.given(inputs=inputs(), bounds=bounds, data=st.data())
def test_tiles_of_any_size_equal_the_whole_matrix(
    recipes: Any, inputs: Inputs, bounds: Bounds, data: st.DataObject
) -> None:
    loss = data.draw(st.sampled_from(recipes)).ours()
    with engine.using("dense"):
        whole = answer(loss, inputs)
    with engine.using("tiled", bounds):
        assert_same(answer(loss, inputs), whole)
    assert_same(answer(loss, inputs), whole)


@few_examples
@hypothesis.given(inputs=inputs(smallest=1), bounds=bounds, data=st.data())
def test_listed_pairs_are_the_same_in_tiles(recipes: Any, inputs: Inputs, bounds: Bounds, data: st.DataObject) -> None:
    loss, (embeddings, _, ref_emb, _) = data.draw(st.sampled_from(recipes)).ours(), inputs
    shape = len(embeddings), len(embeddings if ref_emb is None else ref_emb)
    hypothesis.assume(shape[1])
    pair = st.tuples(st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1))
    listed = [data.draw(st.lists(pair, max_size=20)) for _ in range(2)]
    indices = tuple(torch.tensor([each[i] for each in pairs], dtype=torch.int64) for pairs in listed for i in (0, 1))
    with engine.using("dense"):
        whole = answer(loss, inputs, indices)
    with engine.using("tiled", bounds):
        assert_same(answer(loss, inputs, indices), whole)


@few_examples
@hypothesis.given(inputs=inputs(smallest=1), data=st.data())
def test_permuting_the_batch_permutes_the_gradient(recipes: Any, inputs: Inputs, data: st.DataObject) -> None:
    loss, (embeddings, labels, ref_emb, ref_labels) = data.draw(st.sampled_from(recipes)).ours(), inputs
    order = torch.tensor(data.draw(st.permutations(range(len(embeddings)))))
    value, gradient, *of_references = answer(loss, inputs)
    shuffled = answer(loss, (embeddings[order], labels[order], ref_emb, ref_labels))
    assert_same(shuffled, [value, gradient[order], *of_references])


def test_larger_batches_are_the_same_in_tiles(recipe: Any) -> None:
    """Beyond 25 rows torch takes another way to a distance, so a tile may differ by roundings."""
    torch.manual_seed(0)
    drawn = torch.randn(90, 8, dtype=torch.float64), torch.randint(7, (90,))
    drawn_too = torch.randn(130, 8, dtype=torch.float64), torch.randint(7, (130,))
    loss = recipe.ours()
    with engine.using("dense"):
        whole = answer(loss, (*drawn, *drawn_too))
    for small in (Bounds(tile=1000, rows=31, positives=300), Bounds(tile=64, rows=64), Bounds(rows=1)):
        with engine.using("tiled", small):
            assert_same(answer(loss, (*drawn, *drawn_too)), whole)


def test_no_gradient_is_computed_where_none_is_asked_for(recipe: Any) -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(20, 4), torch.randint(3, (20,))
    loss = recipe.ours()
    with torch.no_grad():
        silent = loss(embeddings.requires_grad_(), labels)
    assert not silent.requires_grad
    assert torch.equal(silent, loss(embeddings, labels))


@pytest.mark.parametrize("loss", [losses.TripletMarginLoss(), losses.MarginLoss(), losses.SmoothAPLoss()], ids=repr)
@pytest.mark.parametrize(("classes", "quickest"), [(32, "dense"), (3, "tiled")])
def test_a_row_for_each_positive_is_made_where_these_are_few(loss: Any, classes: int, quickest: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(128, 8), torch.arange(128) % classes, None, None
    if inputs[0].is_cuda:
        pytest.skip("a GPU holds more, and says the same of both but for roundings")
    found = {}
    for name in ("dense", "tiled"):
        with engine.using(name):
            found[name] = answer(loss, inputs)
    chosen = answer(loss, inputs)
    assert [name for name in found if all(map(torch.equal, chosen, found[name]))] == [quickest]


@pytest.mark.parametrize("engine_name", ["dense", "tiled"])
def test_a_row_of_nan_is_seen_in_the_loss(recipe: Any, engine_name: str) -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(48, 8), torch.arange(48) // 4
    embeddings[3] = torch.nan
    with engine.using(engine_name):
        assert recipe.ours()(embeddings.requires_grad_(), labels).isnan()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mined", [False, True])
@pytest.mark.parametrize("name", ["TripletMarginLoss", "MarginLoss", "AngularLoss", "ContrastiveLoss"])
def test_a_gradient_is_the_same_to_the_bit_each_time(two_threads: None, name: str, mined: bool) -> None:
    torch.manual_seed(0)
    rows = 48 if mined else 128
    embeddings, labels = torch.randn(rows, 16), torch.randint(6, (rows,))
    indices = miners.TripletMarginMiner()(embeddings, labels) if mined else None
    loss = getattr(losses, name)()
    first = answer(loss, (embeddings, labels, None, None), indices)
    for _ in range(5):
        assert all(map(torch.equal, answer(loss, (embeddings, labels, None, None), indices), first))


def test_a_tile_without_columns_has_no_pairs() -> None:
    none = torch.zeros(1, dtype=torch.int64)
    pairs = engine.LabelledPairs(none, torch.zeros(3, dtype=torch.int64), none)
    assert [len(each) for each in pairs.tile(slice(0, 1), slice(3, 3))[::2]] == [0, 1]


@pytest.mark.parametrize("name", ["dens", "onepass"])
def test_unknown_engine_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="known are auto, dense, tiled"), engine.using(name):
        pass
