"""What is learned and lies where a loss would not look for it: in a distance, or in place of a parameter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradbank
from gradbank import distances, losses
from gradbank.component import component, components
from gradbank.engine import using

CLASSIFIERS = sorted(
    name
    for name, each in components().items()
    if issubclass(each, losses.WeightRegularizerMixin) and name != "P2SGradLoss"
)
C, D = 6, 8


@component
class LearnedScale(distances.Distance):
    """The product of embeddings whose entries are weighted, by numbers that are learned."""

    is_inverted = True

    def __post_init__(self) -> None:
        self.weights = nn.Parameter(torch.linspace(0.5, 1.5, D))

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        return (query_emb * self.weights) @ ref_emb.T


def queue(distance: Any) -> Any:
    made = losses.CrossBatchMemory(losses.NTXentLoss(distance=distance), D, 4096)
    made.add_to_memory(torch.randn(4000, D, generator=torch.Generator().manual_seed(1)), torch.arange(4000) % 50)
    return made


@pytest.mark.parametrize(
    "make",
    [
        lambda d: losses.SupConLoss(distance=d),
        lambda d: losses.TripletMarginLoss(distance=d),
        lambda d: losses.NormalizedSoftmaxLoss(5000, D, distance=d),
        lambda d: losses.MultipleLosses([losses.ContrastiveLoss(0.8, 0.2, distance=d)]),
        lambda d: losses.SelfSupervisedLoss(losses.NTXentLoss(distance=d)),
        queue,
    ],
)
def test_what_a_distance_learns_gets_its_gradient_at_any_size(make: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    embeddings, labels, made = torch.randn(600, D), torch.arange(600) % 50, []
    if isinstance(make(LearnedScale()), losses.SelfSupervisedLoss):
        labels = torch.randn(600, D)
    for engine in ("auto", "dense"):
        torch.manual_seed(0)
        loss_fn = make(LearnedScale())
        with using(engine):
            loss = loss_fn(embeddings, labels)
        (weights,) = {each for name, each in loss_fn.named_parameters() if name.endswith("weights")}
        made.append(torch.autograd.grad(loss, weights)[0])
    assert bool(made[0].any())
    torch.testing.assert_close(*made)


def test_a_server_trains_what_a_distance_learns_at_any_size() -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(600, D), torch.arange(600) % 50
    with gradbank.connect("local://") as client:
        there = client.open("scaled", losses.SupConLoss(distance=LearnedScale()))
        optimizer = there.optimizer("SGD", lr=0.1)
        there(embeddings, labels).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
        here = losses.SupConLoss(distance=LearnedScale())
        here(embeddings, labels).backward()
        weights = here.distance.weights
        torch.testing.assert_close(there.local().distance.weights, (weights - 0.1 * weights.grad).detach())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_class_weights_that_are_tied_are_trained(name: str) -> None:
    """What is put in place of the parameter, as by hand or by FSDP, gets the gradient that the parameter would."""
    torch.manual_seed(0)
    loss_fn: Any = components()[name](C, D)
    embeddings, labels = torch.randn(12, D), torch.arange(12) % C
    ((which, weights),) = loss_fn.named_parameters()
    wanted = torch.autograd.grad(loss_fn(embeddings, labels), weights)[0]
    elsewhere = (weights.detach() / 2).requires_grad_()
    delattr(loss_fn, which)
    setattr(loss_fn, which, elsewhere * 2)
    found = torch.autograd.grad(loss_fn(embeddings, labels), elsewhere)[0]
    torch.testing.assert_close(found, wanted * 2)
    assert getattr(loss_fn, which).grad_fn is not None, "it is as it was"
