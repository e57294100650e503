"""Functions of a user's own in a declared loss: seen by negatives only, in every engine, with all that they learn."""

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradbank import component, distances, engine, losses, miners, reducers, regularizers

Formula = Callable[[Any], Mapping[str, Any]]


def declared(negatives: Formula, terms: Formula, distance: distances.Distance) -> losses.PairLoss:
    class Own(losses.PairLoss):
        def negatives(self, anchors: Any) -> Mapping[str, Any]:
            return negatives(anchors)

        def terms(self, anchors: Any) -> Mapping[str, Any]:
            return terms(anchors)

    return Own(distance=distance)


def batch(rows: int) -> tuple[Tensor, Tensor]:
    made = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return made.requires_grad_(), torch.arange(rows) // 4


COSINE, EUCLIDEAN = distances.CosineSimilarity, distances.LpDistance
SINGULAR: dict[str, tuple[Callable[[Tensor], Tensor], type[distances.Distance]]] = {
    "the distance of a cosine": (lambda s: (2 - 2 * s).clamp(min=0).sqrt(), COSINE),
    "the angle of a cosine": (lambda s: s.clamp(max=1).acos(), COSINE),
    "the inverse of a distance": (lambda s: 1 / s, EUCLIDEAN),
    "the logarithm of a distance": (lambda s: s.log(), EUCLIDEAN),
}


def looped(f: Callable[[Tensor], Tensor], kind: str, distance: distances.Distance) -> Tensor:
    """The loss of each pair in turn, where the function has a value and a derivative."""
    rows, labels = batch(12)
    rows.retain_grad()
    unit = torch.nn.functional.normalize(rows, dim=1)
    made = []
    for i in range(12):
        far = [
            f(unit[i] @ unit[j] if isinstance(distance, COSINE) else (unit[i] - unit[j]).norm())
            for j in range(12)
            if labels[i] != labels[j]
        ]
        made.append((-torch.stack(far)).logsumexp(0) if kind == "logsumexp" else torch.stack(far).sum())
    torch.stack(made).mean().backward()
    assert rows.grad is not None
    return rows.grad


@pytest.mark.parametrize("engine_name", ["dense", "tiled"])
@pytest.mark.parametrize("kind", ["logsumexp", "sum"])
@pytest.mark.parametrize("what", SINGULAR)
def test_a_function_need_have_no_derivative_where_there_is_no_negative(what: str, kind: str, engine_name: str) -> None:
    f, distance = SINGULAR[what][0], SINGULAR[what][1]()
    wanted = {
        "logsumexp": lambda anchors: {"far": engine.LogSumExp(lambda s: -f(s))},
        "sum": lambda anchors: {"far": engine.Sum(lambda s: f(s))},
    }[kind]
    loss_fn = declared(wanted, lambda anchors: {"loss": anchors.per_anchor(anchors.found["far"].value)}, distance)
    rows, labels = batch(12)
    with engine.using(engine_name):
        loss_fn(rows, labels).backward()
    torch.testing.assert_close(rows.grad, looped(f, kind, distance))


@pytest.mark.parametrize(
    "kernel",
    [lambda p, n: (n - p + 0.2).relu().square(), lambda p, n: (n - p).exp(), lambda p, n: (3 - n + p).log()],
    ids=["a squared hinge", "an exponential", "a logarithm"],
)
@pytest.mark.parametrize("queued", [False, True])
def test_a_kernel_of_triplets_need_have_no_bound(kernel: Callable[[Tensor, Tensor], Tensor], queued: bool) -> None:
    made = []
    for name in ("dense", "tiled"):
        loss_fn: Any = declared(
            lambda anchors: {"loss": engine.Triplets(kernel)},
            lambda anchors: {"loss": anchors.per_triplet("loss")},
            COSINE(),
        )
        loss_fn = losses.CrossBatchMemory(loss_fn, 4, 40) if queued else loss_fn
        rows, labels = batch(24)
        with engine.using(name):
            value = sum(loss_fn(part, of) for part, of in zip(rows.split(8), labels.split(8), strict=True))
            value = value if queued else loss_fn(rows, labels)
        value.backward()
        made.append((value.detach(), rows.grad))
        assert value.isfinite()
    torch.testing.assert_close(made[0], made[1])


@pytest.mark.parametrize("statistic", ["each", "sum", "triplets"])
def test_numbers_made_of_the_embeddings_hand_their_gradient_on(statistic: str) -> None:
    wanted: dict[str, tuple[Formula, Formula]] = {
        "each": (
            lambda a: {"loss": engine.Each(lambda s, t: torch.tanh(s - t), row=a.embeddings[:, :1])},
            lambda a: {"loss": a.per_negative("loss")},
        ),
        "sum": (
            lambda a: {"far": engine.Sum(lambda s, t: torch.tanh(s - t), row=a.embeddings[:, :1])},
            lambda a: {"loss": a.per_anchor(a.found["far"].value)},
        ),
        "triplets": (
            lambda a: {"loss": engine.Triplets(lambda p, n, t: torch.tanh(p - n + t), row=a.embeddings[:, :1])},
            lambda a: {"loss": a.per_triplet("loss")},
        ),
    }
    found = []
    for name in ("dense", "tiled"):
        rows, labels = batch(40)
        with engine.using(name):
            declared(*wanted[statistic], EUCLIDEAN())(rows, labels).backward()
        found.append(rows.grad)
    torch.testing.assert_close(found[0], found[1])


@component
class OfNamedNumbers(losses.PairLoss):
    """Draws negatives away by a slope that is learned, among numbers that have names."""

    numbers: dict[str, Any] = field(default_factory=dict)

    def negatives(self, anchors: Any) -> Mapping[str, Any]:
        return {"far": engine.LogSumExp(lambda s: -s * self.numbers["slope"])}

    def terms(self, anchors: Any) -> Mapping[str, Any]:
        return {"loss": anchors.per_anchor(anchors.found["far"].value)}


def test_what_is_learned_by_name_is_learned_of_any_batch() -> None:
    found = []
    for name in ("dense", "auto"):
        slope = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        with engine.using(name):
            OfNamedNumbers(numbers={"slope": slope})(*batch(600)).backward()
        assert slope.grad is not None
        found.append(slope.grad)
    torch.testing.assert_close(found[0], found[1])


def test_a_divisor_that_is_a_number_is_that_of_all_groups_of_anchors() -> None:
    loss_fn = declared(
        lambda anchors: {},
        lambda anchors: {"loss": anchors.per_anchor(anchors.sum(anchors.s) / anchors.number(), divisor=1000.0)},
        EUCLIDEAN(),
    )
    loss_fn.reducer = reducers.DivisorReducer()
    rows, labels = torch.randn(60, 4), torch.zeros(60, dtype=torch.int64)
    wanted = loss_fn(rows, labels)
    with engine.using("tiled", engine.Bounds(positives=500)):  # so that there are several
        torch.testing.assert_close(loss_fn(rows, labels), wanted)


def test_a_regularizer_of_ones_own_may_give_a_number() -> None:
    class Warming(regularizers.BaseRegularizer):
        def forward(self, rows: Tensor) -> Any:
            return 1.5

    rows, labels = batch(12)
    plain = losses.ContrastiveLoss()(rows, labels)
    torch.testing.assert_close(losses.ContrastiveLoss(embedding_regularizer=Warming())(rows, labels), plain + 1.5)


def of_triplets() -> losses.PairLoss:
    return declared(
        lambda anchors: {"loss": engine.Hinge(1, 0.05)},
        lambda anchors: {"loss": anchors.per_triplet("loss")},
        EUCLIDEAN(),
    )


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("mined", [False, True])
def test_a_loss_of_triplets_keeps_those_that_are_named(queued: bool, mined: bool) -> None:
    """And does not take all that their pairs could make."""
    found = []
    for made in (of_triplets(), losses.TripletMarginLoss(reducer=reducers.MeanReducer())):
        rows, labels = batch(12)
        miner = miners.TripletMarginMiner(type_of_triplets="semihard")
        named = tuple(torch.tensor(each) for each in ([0, 0, 5], [1, 2, 4], [4, 9, 11]))
        named = miner(rows, labels) if mined else named
        loss_fn: Any = losses.CrossBatchMemory(made, 4, 40, miner=miner) if queued else made
        values = [loss_fn(rows, labels, named) for _ in range(2)]
        sum(values).backward()
        found.append((torch.stack(values).detach(), rows.grad))
    torch.testing.assert_close(found[0], found[1])


def test_a_loss_of_triplets_and_pairs_takes_named_triplets_for_pairs() -> None:
    both = declared(
        lambda anchors: {"loss": engine.Hinge(1, 0.05)},
        lambda anchors: {"loss": anchors.per_triplet("loss"), "near": anchors.per_positive(anchors.s)},
        EUCLIDEAN(),
    )
    rows, labels = batch(12)
    a, p, n = (torch.tensor(each) for each in ([0, 5], [1, 4], [4, 11]))
    torch.testing.assert_close(both(rows, labels, (a, p, n)), both(rows, labels, (a, p, a, n)))


@pytest.mark.parametrize(
    ("negatives", "terms", "message"),
    [
        (lambda a: {}, lambda a: None, r"Own.terms must give parts by name, .*, got nothing"),
        (lambda a: {}, lambda a: {}, "got nothing"),
        (lambda a: {}, lambda a: a.per_anchor(a.sum(a.s)), "got a Part"),
        (lambda a: {}, lambda a: {"loss": a.sum(a.s)}, "got {'loss': Tensor}"),
        (lambda a: {"near": torch.exp}, lambda a: {}, "Own.negatives must give statistics by name, .*'near': builtin_"),
        (lambda a: None, lambda a: {}, "Own.negatives must give statistics by name, .*, got nothing"),
    ],
)
@pytest.mark.parametrize("rows", [8, 600])
def test_what_is_no_formula_is_told_what_one_gives(negatives: Formula, terms: Formula, message: str, rows: int) -> None:
    with pytest.raises(TypeError, match=message):
        declared(negatives, terms, EUCLIDEAN())(*batch(rows))


def test_a_number_of_all_anchors_is_not_made_of_some() -> None:
    loss_fn = declared(lambda anchors: {}, lambda anchors: {"loss": anchors.reduced(anchors.s.mean())}, EUCLIDEAN())
    rows, labels = torch.randn(60, 4), torch.zeros(60, dtype=torch.int64)
    assert loss_fn(rows, labels).isfinite()
    with (
        engine.using("tiled", engine.Bounds(positives=500)),
        pytest.raises(ValueError, match="written on the positives of all anchors together"),
    ):
        loss_fn(rows, labels)
