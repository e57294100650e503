"""Triplets by their margin: the interval of distances that says the same without listing them."""

from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradbank import distances, miners

Kind = Literal["all", "hard", "semihard", "easy"]
KINDS: tuple[Kind, ...] = ("all", "hard", "semihard", "easy")
MARGINS = [0.2, 0.0, -0.1, 1e-30, 3.0]


def counts(miner: miners.TripletMarginMiner, u: Tensor, v: Tensor) -> Tensor:
    """`(P, N)`: PML's condition, as it is written there."""
    margin = v[None, :] - u[:, None]
    if miner.type_of_triplets == "easy":
        return margin > miner.margin
    chosen = margin <= miner.margin
    if miner.type_of_triplets == "hard":
        chosen &= margin <= 0
    elif miner.type_of_triplets == "semihard":
        chosen &= margin > 0
    return chosen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interval_holds_just_the_distances_that_count(kind: Kind, margin: float, dtype: torch.dtype) -> None:
    """Among them the floats beside each threshold, where rounding decides."""
    torch.manual_seed(0)
    u = torch.cat([torch.rand(50) * 2, torch.arange(-10, 11) / 10, torch.tensor([0.0, -0.0, 1e-40, 1e-8, 700])]).to(
        dtype
    )
    v = torch.cat([u, u + margin, u - margin])
    near = [v]
    for way in (torch.inf, -torch.inf):
        beside = v
        for _ in range(3):
            beside = torch.nextafter(beside, torch.full_like(v, way))
            near.append(beside)
    v = torch.cat(near)
    miner = miners.TripletMarginMiner(margin, kind)
    low, high = miner.interval(u).unbind(1)
    inside = (v >= low[:, None]) & (v < high[:, None])
    assert torch.equal(inside, counts(miner, u, v))
    assert miner.interval(u).dtype == dtype
    assert bool((low <= high).all())
    assert bool(inside.any()) != (kind == "semihard" and margin <= 0)


@pytest.mark.parametrize(
    "distance", [distances.LpDistance(), distances.CosineSimilarity()], ids=lambda d: type(d).__name__
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("references", [False, True])
def test_counting_inside_the_intervals_gives_the_listed_triplets(
    distance: distances.Distance, kind: Kind, references: bool
) -> None:
    """On a grid of embeddings, where many distances are equal."""
    torch.manual_seed(0)
    embeddings, labels = torch.randint(-2, 3, (60, 2)).float() + 0.5, torch.randint(4, (60,))
    others, known = (
        (torch.randint(-2, 3, (70, 2)).float(), torch.randint(4, (70,))) if references else (embeddings, labels)
    )
    for margin in MARGINS:
        miner = miners.TripletMarginMiner(margin, kind, distance=distance)
        d = distance(embeddings, others)
        u = -d if distance.is_inverted else d
        same = labels[:, None] == known
        negatives = ~same
        if not references:
            same.fill_diagonal_(False)
        a, p = same.nonzero(as_tuple=True)
        low, high = miner.interval(u[a, p]).unbind(1)
        inside = negatives[a] & (u[a] >= low[:, None]) & (u[a] < high[:, None])
        pair, n = inside.nonzero(as_tuple=True)
        found = miner(embeddings, labels, others, known)
        assert sorted(zip(*(i.tolist() for i in found))) == sorted(zip(a[pair].tolist(), p[pair].tolist(), n.tolist()))


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="must be all, hard, semihard or easy, got 'soft'"):
        miners.TripletMarginMiner(type_of_triplets="soft")  # type: ignore[arg-type]


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        made = function(*arguments, **(keywords or {}))
        tensors = made if isinstance(made, tuple | list) else [made]
        self.numbers = max([self.numbers, *(each.numel() for each in tensors if isinstance(each, Tensor))])
        return made


@pytest.mark.parametrize("name", ["TripletMarginMiner", "AngularMiner"])
def test_few_triplets_are_found_without_making_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes far apart have half a million triplets, of which a hundredth is taken."""
    for module in ("rows", "angular"):
        monkeypatch.setattr(f"gradbank.miners.{module}.ENTRIES", 2**12)
    torch.manual_seed(0)
    labels = torch.arange(128) % 2
    embeddings = torch.randn(128, 4) * 0.1
    embeddings[:, 0] += 2.0 * labels - 1
    miner = miners.TripletMarginMiner(1.4) if name == "TripletMarginMiner" else miners.AngularMiner(10)
    with Largest() as seen:
        found = miner(embeddings, labels)
    assert 0 < len(found[0]) < 10_000
    assert seen.numbers <= 128 * 128


def plainly(miner: miners.TripletMarginMiner, embeddings: Tensor, labels: Tensor) -> set[tuple[int, int, int]]:
    """The triplets, by three loops."""
    d, found = miner.distance(embeddings), set()
    sign = -1 if miner.distance.is_inverted else 1
    for a in range(len(labels)):
        for p in range(len(labels)):
            for n in range(len(labels)):
                if p != a and labels[p] == labels[a] != labels[n]:
                    inside = counts(miner, sign * d[a, p].view(1), sign * d[a, n].view(1))
                    found |= {(a, p, n)} if bool(inside) else set()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", [0.2, torch.inf, -torch.inf])
@pytest.mark.parametrize("what", ["zeros", "NaN", "infinity"])
def test_distances_that_are_no_numbers_are_compared_as_any(kind: Kind, margin: float, what: str) -> None:
    """They have no place among sorted ones, and what was counted there lay outside of the list."""
    torch.manual_seed(0)
    embeddings, labels = torch.randn(14, 4), torch.arange(14) % 4
    distance: distances.Distance = distances.LpDistance(normalize_embeddings=False)
    if what == "zeros":  # whose noise has no signal
        embeddings[11:], distance = 0, distances.SNRDistance()
    elif what == "NaN":
        embeddings[3, 1] = torch.nan
    else:
        embeddings[3, 1], embeddings[7, 0] = torch.inf, -torch.inf
    miner = miners.TripletMarginMiner(margin, kind, distance=distance)
    a, p, n = miner(embeddings, labels)
    assert set(zip(a.tolist(), p.tolist(), n.tolist())) == plainly(miner, embeddings, labels)
    assert not bool((labels[a] == labels[n]).any())
