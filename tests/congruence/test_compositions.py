"""Components within components, as PML composes them: reducers in reducers, miners beside lists, views in wrappers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning import reducers as pml_reducers
from torch import Tensor

import gradbank
from gradbank import losses, miners, reducers, regularizers
from gradbank.errors import InvalidComponent, InvalidRequest

GENERATOR = torch.Generator().manual_seed(0)
E, Y = torch.randn(12, 6, generator=GENERATOR), torch.arange(12) // 3
A, B = (torch.randn(6, 4, generator=GENERATOR) for _ in range(2))


def squares(module: Any) -> Any:
    class Squares(module.BaseReducer):  # type: ignore[misc]
        def forward(self, loss_dict: Any, embeddings: Any, labels: Any) -> Any:
            return sum((each["losses"] ** 2).sum() for each in loss_dict.values())

    return Squares()


def largest(module: Any) -> Any:
    class Largest(module.MultipleReducers):  # type: ignore[misc]
        def sub_loss_reduction(self, sub_losses: Any, embeddings: Any = None, labels: Any = None) -> Any:
            return sub_losses.max() * 2

    return Largest({})


NESTED: dict[str, Callable[[Any], Any]] = {
    "parts in parts": lambda m: m.MultipleReducers({"pos_loss": m.MultipleReducers({"pos_loss": m.SumReducer()})}),
    "parts by anchor": lambda m: m.PerAnchorReducer(m.MultipleReducers({"loss": m.SumReducer()})),
    "own in parts": lambda m: m.MultipleReducers({"pos_loss": squares(m)}),
    "own by default": lambda m: m.MultipleReducers({"pos_loss": m.MeanReducer()}, default_reducer=squares(m)),
    "own by anchor": lambda m: m.PerAnchorReducer(squares(m)),
    "own parts in parts": lambda m: m.MultipleReducers({"neg_loss": largest(m)}),
    "by anchor in parts": lambda m: m.MultipleReducers({"pos_loss": m.PerAnchorReducer(m.SumReducer())}),
}


@pytest.mark.parametrize("made", NESTED)
def test_a_reducer_within_another_reduces_as_it_says(made: str) -> None:
    here, there = (E.clone().requires_grad_() for _ in range(2))
    value = losses.ContrastiveLoss(reducer=NESTED[made](reducers))(here, Y)
    wanted = pml_losses.ContrastiveLoss(reducer=NESTED[made](pml_reducers))(there, Y)
    torch.testing.assert_close(value, wanted)
    value.backward()
    wanted.backward()
    torch.testing.assert_close(here.grad, there.grad)


@pytest.mark.parametrize("made", [made for made in NESTED if "by anchor" not in made])  # for which PML's fails
def test_a_reducer_within_another_reduces_as_it_says_of_a_queue(made: str) -> None:
    here = losses.CrossBatchMemory(losses.ContrastiveLoss(reducer=NESTED[made](reducers)), 6, 40)
    there = pml_losses.CrossBatchMemory(pml_losses.ContrastiveLoss(reducer=NESTED[made](pml_reducers)), 6, 40)
    for _ in range(2):
        torch.testing.assert_close(here(E, Y), there(E, Y))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: reducers.PerAnchorReducer(reducers.DoNothingReducer()), "one number of losses, got DoNothingReducer"),
        (lambda: reducers.MultipleReducers({"a": reducers.DoNothingReducer()}), "got DoNothingReducer"),
        (lambda: reducers.MultipleReducers({"a": None}), "got NoneType"),
        (lambda: reducers.MultipleReducers([reducers.MeanReducer()]), "by the names of the parts of a loss"),
        (lambda: reducers.ClassWeightedReducer([1.0, 2.0]), "weights must be a tensor, got list"),
        (lambda: losses.MultipleLosses([None, losses.NTXentLoss()]), "losses must each be a Loss, got None"),
        (lambda: losses.MultipleLosses([losses.NTXentLoss()], weights=["a"]), "weights must be numbers, got 'a'"),
    ],
)
def test_what_cannot_be_composed_is_refused_as_it_is_built(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        build()


def test_parts_that_are_not_reduced_are_refused_where_numbers_are_added() -> None:
    parts = losses.ContrastiveLoss(reducer=reducers.DoNothingReducer())
    with pytest.raises(ValueError, match=r"losses\[0\] gives its parts, and MultipleLosses adds numbers: reduce them"):
        losses.MultipleLosses([parts])(E, Y)
    costly = regularizers.LpRegularizer(reducer=reducers.DoNothingReducer())
    with pytest.raises(ValueError, match="the embedding_regularizer gives its parts"):
        losses.ContrastiveLoss(embedding_regularizer=costly)(E, Y)


TRIPLETS = tuple(torch.tensor([index]) for index in (0, 1, 5))
PAIRS = tuple(torch.tensor(each) for each in ([0, 1], [1, 2], [0, 0], [5, 6]))


@pytest.mark.parametrize("given", [TRIPLETS, PAIRS], ids=["triplets", "pairs"])
@pytest.mark.parametrize("loss", ["TripletMarginLoss", "MarginLoss"])
def test_triplets_that_are_given_are_added_to_those_that_are_mined(loss: str, given: tuple[Tensor, ...]) -> None:
    """In the first batch, in which a row's place is its slot, as PML reads it."""

    def step(module: Any, of_miners: Any) -> Tensor:
        miner = of_miners.TripletMarginMiner(type_of_triplets="hard")
        value: Tensor = module.CrossBatchMemory(getattr(module, loss)(), 6, 12, miner=miner)(E, Y, given)
        return value

    torch.testing.assert_close(step(losses, miners), step(pml_losses, pml_miners))


@pytest.mark.parametrize("place", range(4))
def test_pairs_beside_mined_triplets_are_of_the_batch(place: int) -> None:
    queue = losses.CrossBatchMemory(losses.TripletMarginLoss(), 6, 12, miner=miners.TripletMarginMiner())
    given = tuple(torch.tensor([-1 if place == each else index]) for each, index in enumerate((0, 1, 0, 5)))
    with pytest.raises(ValueError, match=r"names (anchor|positive|negative)s -1 to -1, but must stay within 0\.\.11"):
        queue(E, Y, given)
    assert len(queue) == 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_second_view_gets_its_gradient_among_several_losses_too(symmetric: bool) -> None:
    alone = losses.SelfSupervisedLoss(losses.NTXentLoss(), symmetric=symmetric)
    made = []
    for loss_fn in (alone, losses.MultipleLosses([alone])):
        views = [view.clone().requires_grad_() for view in (A, B)]
        loss_fn(*views).backward()
        made.append([view.grad for view in views])
    for found, wanted in zip(made[1], made[0], strict=True):
        assert wanted is not None
        torch.testing.assert_close(found, wanted)


def test_weights_at_two_places_of_a_loss_are_not_hosted_as_two(client: gradbank.Client, name: str) -> None:
    head = losses.ArcFaceLoss(4, 6)
    with pytest.raises(InvalidRequest, match=r"losses\.0\.W and losses\.1\.W are one here"):
        client.open(name, losses.MultipleLosses([head, head]))
    head.requires_grad_(False)
    both = losses.MultipleLosses([head, head])
    assert torch.equal(client.open(name, both)(E, Y), both(E, Y))


def test_what_from_pml_makes_is_the_session_of_what_is_written_out(client: gradbank.Client, name: str) -> None:
    assert client.open(name, gradbank.from_pml(pml_losses.NTXentLoss())).created
    assert not client.open(name, losses.NTXentLoss(), rank=1).created


def test_a_loss_of_many_layers_is_hosted_and_one_of_too_many_is_refused(client: gradbank.Client, name: str) -> None:
    inner = reducers.MultipleReducers({"loss": reducers.PerAnchorReducer(reducers.MeanReducer())})
    made: Any = losses.CrossBatchMemory(losses.NTXentLoss(reducer=inner), 6, 64)
    for _ in range(2):
        made = losses.MultipleLosses([made])
    assert torch.equal(client.open(name, made)(E, Y), made(E, Y))
    for _ in range(6):
        made = losses.MultipleLosses([made])
    with pytest.raises(InvalidComponent, match="nested"):
        client.open(f"{name}-deeper", made)
