"""Distances that are equal, and losses that are exactly at a bound: counted alike by every engine."""

from collections.abc import Callable
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from gradbank import distances, engine, losses, miners, reducers
from gradbank.engine import Bounds

from .conftest import bounds, examples

# Of rows of small integers these are integers, however they are computed, so that many are equal and many losses are
# exactly at a bound. Sums of integers are exact too, in any order.
EXACT: dict[str, Callable[[], distances.Distance]] = {
    "L1": lambda: distances.LpDistance(p=1, normalize_embeddings=False),
    "dot": lambda: distances.DotProductSimilarity(normalize_embeddings=False),
}
COUNTING: dict[str, tuple[Callable[[], reducers.Reducer], Callable[[float], bool]]] = {
    "mean": (reducers.MeanReducer, lambda loss: True),
    "nonzero": (reducers.AvgNonZeroReducer, lambda loss: loss > 0),
    "above": (lambda: reducers.ThresholdReducer(low=1), lambda loss: loss > 1),
    "below": (lambda: reducers.ThresholdReducer(high=3), lambda loss: loss < 3),
    "between": (lambda: reducers.ThresholdReducer(low=1, high=4), lambda loss: 1 < loss < 4),
}
Rows = tuple[Tensor, Tensor]


@st.composite
def integers(draw: st.DrawFn, most: int = 14, least: int = 1) -> Rows:
    size = draw(st.integers(least, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    rows = torch.randint(-2, 3, (size, 2), generator=generator).double()
    return rows, torch.randint(draw(st.integers(1, 3)), (size,), generator=generator)


def average(costs: list[float], counts: Callable[[float], bool]) -> float:
    kept = [cost for cost in costs if counts(cost)]
    return sum(kept) / max(len(kept), 1)


def by_every_engine(call: Callable[[Tensor], Tensor], embeddings: Tensor, small: Bounds) -> list[list[Tensor]]:
    made = []
    for kind, each in (("dense", None), ("tiled", None), ("tiled", small)):
        with engine.using(kind, each):
            leaf = embeddings.clone().requires_grad_()
            value = call(leaf)
            made.append([value.detach(), *torch.autograd.grad(value, leaf)])
    return made


@examples(60)
@hypothesis.given(
    batch=integers(),
    others=st.none() | integers(30),
    distance=st.sampled_from(sorted(EXACT)),
    reducer=st.sampled_from(sorted(COUNTING)),
    margin=st.integers(0, 3),
    small=bounds,
)
def test_triplets_at_a_bound_are_counted_exactly(
    batch: Rows, others: Rows | None, distance: str, reducer: str, margin: int, small: Bounds
) -> None:
    (embeddings, labels), made, (reduces, counts) = batch, EXACT[distance](), COUNTING[reducer]
    loss = losses.TripletMarginLoss(margin=float(margin), distance=made, reducer=reduces())
    rows, known = batch if others is None else others
    far = (-made(embeddings, rows) if made.is_inverted else made(embeddings, rows)).tolist()
    costs = [
        max(far[a][p] - far[a][n] + margin, 0.0)
        for a in range(len(embeddings))
        for p in range(len(rows))
        for n in range(len(rows))
        if labels[a] == known[p] and labels[a] != known[n] and (others is not None or a != p)
    ]
    found = by_every_engine(lambda leaf: loss(leaf, labels, None, *(others or ())), embeddings, small)
    for value, gradient in found:
        assert value.item() == average(costs, counts)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-12, atol=1e-12)


@examples(60)
@hypothesis.given(
    batch=integers(),
    distance=st.sampled_from(sorted(EXACT)),
    reducer=st.sampled_from(sorted(COUNTING)),
    margins=st.tuples(st.integers(-1, 2), st.integers(-1, 3)),
    small=bounds,
)
def test_pairs_at_a_bound_are_counted_exactly(
    batch: Rows, distance: str, reducer: str, margins: tuple[int, int], small: Bounds
) -> None:
    (embeddings, labels), made, (reduces, counts) = batch, EXACT[distance](), COUNTING[reducer]
    loss = losses.ContrastiveLoss(float(margins[0]), float(margins[1]), distance=made, reducer=reduces())
    s, sign, size = made(embeddings).tolist(), -1 if made.is_inverted else 1, range(len(embeddings))
    pull = [max(sign * (s[a][b] - margins[0]), 0.0) for a in size for b in size if labels[a] == labels[b] and a != b]
    push = [max(sign * (margins[1] - s[a][b]), 0.0) for a in size for b in size if labels[a] != labels[b]]
    found = by_every_engine(lambda leaf: loss(leaf, labels), embeddings, small)
    for value, gradient in found:
        assert value.item() == average(pull, counts) + average(push, counts)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-12, atol=1e-12)


@examples(60)
@hypothesis.given(
    batch=integers(8),
    earlier=integers(22),
    distance=st.sampled_from(sorted(EXACT)),
    kind=st.sampled_from(["all", "hard", "semihard", "easy"]),
    margins=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    small=bounds,
)
def test_a_miner_at_its_bounds_keeps_in_a_queue_what_it_lists(
    batch: Rows, earlier: Rows, distance: str, kind: Any, margins: tuple[int, int], small: Bounds
) -> None:
    """Where loss and miner have the same distance, no triplet of a queue is listed."""
    embeddings, labels = batch
    miner = miners.TripletMarginMiner(float(margins[0]), kind, distance=EXACT[distance]())
    loss = losses.TripletMarginLoss(float(margins[1]), distance=EXACT[distance](), reducer=reducers.MeanReducer())

    def queue(leaf: Tensor) -> Tensor:
        made = losses.CrossBatchMemory(loss, 2, 30, miner).double()
        made.add_to_memory(*earlier)
        value: Tensor = made(leaf, labels)
        return value

    rows, known = (torch.cat(both) for both in zip(earlier, batch))
    a, p, n = miner(embeddings, labels, rows, known)
    kept = p != a + len(earlier[0])  # an anchor is not its own positive
    wanted = by_every_engine(
        lambda leaf: loss(leaf, labels, (a[kept], p[kept], n[kept]), rows, known), embeddings, small
    )[0]
    for found in by_every_engine(queue, embeddings, small):
        assert found[0].item() == wanted[0].item()
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-12, atol=1e-12)
