"""Distances of a user's own, written for pytorch-metric-learning: one text, run with either library."""

from typing import Any

import pytest
import pytorch_metric_learning.distances as pml_distances
import pytorch_metric_learning.losses as pml_losses
import pytorch_metric_learning.miners as pml_miners
import torch
from torch import Tensor

from gradbank import component, distances, engine, losses, miners
from gradbank.component import foundation


def written(library: Any) -> dict[str, Any]:
    """Distances, written against the names of `library`."""

    class Similarity(library.BaseDistance):  # type: ignore[misc]
        """Tells the constructor of its base that larger is closer."""

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(is_inverted=True, **kwargs)

        def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
            return (query_emb @ ref_emb.T).tanh()

    class Squashed(library.CosineSimilarity):  # type: ignore[misc]
        """Does something else than normalising."""

        def maybe_normalize(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
            return super().maybe_normalize(embeddings.tanh(), dim, **kwargs) * 0.9

    class OnACube(library.LpDistance):  # type: ignore[misc]
        def normalize(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
            return embeddings / self.get_norm(embeddings, dim=dim, keepdim=True) ** 2

    class Taxi(library.LpDistance):  # type: ignore[misc]
        """Another matrix than that of a distance which has quicker ways to its own."""

        def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
            return (query_emb[:, None] - ref_emb).abs().sum(2)

    class NoiseOnly(library.SNRDistance):  # type: ignore[misc]
        def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
            return (query_emb[:, None] - ref_emb).square().mean(2)

    class Shifted(library.SNRDistance):  # type: ignore[misc]
        def maybe_normalize(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
            return embeddings * torch.linspace(1, 2, embeddings.shape[1], dtype=embeddings.dtype)

    return {
        "similarity": Similarity(),
        "of long rows": Similarity(normalize_embeddings=False),
        "squashed": Squashed(),
        "on a cube": OnACube(p=3),
        "squared": OnACube(power=2),
        "taxi": Taxi(),
        "squared taxi": Taxi(power=2),
        "noise only": NoiseOnly(),
        "shifted": Shifted(),
    }


NAMES = list(written(distances))
OURS, THEIRS = (distances, losses, miners), (pml_distances, pml_losses, pml_miners)


def computed(libraries: Any, name: str, what: str) -> list[Tensor]:
    """Values and gradients of 40 embeddings, more than those that `LpDistance` compares one by one."""
    mine, its_losses, its_miners = libraries
    distance = written(mine)[name]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 5, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.arange(40) % 8
    listed = its_miners.TripletMarginMiner(margin=10, distance=distance)(rows, labels)
    made = {
        "matrix": lambda: distance(rows, rows[:30] + 1),
        "contrastive": lambda: its_losses.ContrastiveLoss(0.3, 0.2, distance=distance)(rows, labels),
        "softmax": lambda: its_losses.NTXentLoss(distance=distance)(rows, labels),
        "triplets": lambda: its_losses.TripletMarginLoss(distance=distance)(rows, labels),
        "listed": lambda: its_losses.TripletMarginLoss(distance=distance)(rows, labels, listed),
        "swapped": lambda: its_losses.TripletMarginLoss(distance=distance, swap=True)(rows, labels, listed),
    }[what]()
    return [made, torch.autograd.grad(made.sum(), rows)[0]]


@pytest.mark.parametrize("what", ["matrix", "contrastive", "softmax", "triplets", "listed", "swapped"])
@pytest.mark.parametrize("name", NAMES)
def test_a_distance_written_for_pml_measures_here_as_there(name: str, what: str) -> None:
    theirs = computed(THEIRS, name, what)
    torch.testing.assert_close(computed(OURS, name, what), theirs, rtol=1e-8, atol=1e-10)
    with engine.using("tiled", engine.Bounds(tile=60, rows=4)):
        torch.testing.assert_close(computed(OURS, name, what), theirs, rtol=1e-8, atol=1e-10)


def test_pml_names_of_a_distance_are_here() -> None:
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for name, options in (("LpDistance", {"p": 1}), ("CosineSimilarity", {}), ("SNRDistance", {})):
        ours, theirs = getattr(distances, name)(**options), getattr(pml_distances, name)(**options)
        assert ours.is_inverted == theirs.is_inverted
        for call in (
            lambda each: each.maybe_normalize(rows),
            lambda each: each.normalize(rows, dim=0),
            lambda each: each.get_norm(rows),
            lambda each: each.smallest_dist(rows, dim=1).values,
            lambda each: each.largest_dist(rows),
            lambda each: each.margin(rows[0], rows[1]),
            lambda each: each.pairwise_distance(rows[:3], rows[3:]),
        ):
            torch.testing.assert_close(call(ours), call(theirs))


@pytest.mark.parametrize(
    "decorated", [component, foundation, lambda cls: cls], ids=["component", "foundation", "plain"]
)
def test_larger_is_closer_if_the_class_says_so(decorated: Any) -> None:
    @decorated
    class Similarity(distances.Distance):
        is_inverted = True

        def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
            return query_emb @ ref_emb.T

    class Again(Similarity):  # type: ignore[misc]
        """Says nothing of it."""

    class Farther(Similarity):  # type: ignore[misc]
        is_inverted = False

    assert Similarity().is_inverted
    assert Again().is_inverted
    assert not Farther().is_inverted
    assert not Similarity(is_inverted=False).is_inverted
    rows, labels = torch.randn(12, 4), torch.arange(12) % 3
    value = losses.NTXentLoss(distance=Similarity())(rows, labels)
    torch.testing.assert_close(value, losses.NTXentLoss()(rows, labels))


def test_what_embeddings_become_may_come_from_another_base() -> None:
    class Doubled:
        def maybe_normalize(self, embeddings: Tensor, dim: int = 1, **kwargs: Any) -> Tensor:
            return embeddings * 2

    class Mine(Doubled, distances.LpDistance):
        pass

    class Tripled(distances.LpDistance):
        def normalized(self, embeddings: Tensor, inverse: Tensor | None) -> Tensor:
            return embeddings * 3

    class Of(Tripled):
        def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
            return torch.cdist(query_emb, ref_emb)

    rows = torch.randn(30, 4)
    torch.testing.assert_close(Mine()(rows), torch.cdist(rows * 2, rows * 2))
    torch.testing.assert_close(Of()(rows), torch.cdist(rows * 3, rows * 3))


def test_a_property_cannot_say_what_an_argument_may() -> None:
    with pytest.raises(TypeError, match=r"Mine\.is_inverted must be True or False, or an argument, and not a property"):
        type("Mine", (distances.Distance,), {"is_inverted": property(lambda self: True)})


@pytest.mark.parametrize("name", ["forward", "margin", "smallest_dist"])
def test_what_nobody_would_call_is_refused_where_it_is_defined(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Mine overrides {name}, which losses and miners do not call: .* compute_mat"):
        type("Mine", (distances.CosineSimilarity,), {name: lambda self, *args: args[0]})
