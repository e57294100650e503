"""Losses with a proxy per class, against their definitions and PML."""

from typing import Any

import pytest
import pytorch_metric_learning.losses as pml_losses
import torch
from torch import Tensor
from torch.nn import functional as F

from gradbank import distances, engine, losses, reducers
from gradbank.engine import Bounds

C, D = 11, 4
BOUNDS = [None, Bounds(tile=20, rows=4), Bounds(tile=20, rows=4, positives=3), Bounds(tile=2, rows=1, positives=1)]
Labels = Tensor


def batch(rows: int = 9) -> tuple[Tensor, Labels]:
    generator = torch.Generator().manual_seed(2)
    made = torch.randn(rows, D, dtype=torch.float64, generator=generator)
    return made, torch.randint(C - 3, (rows,), generator=generator)


def made(name: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return getattr(losses, name)(C, D, **arguments).to(torch.empty(0).device, torch.float64)


def answer(loss: Any, embeddings: Tensor, *rest: Any) -> list[Tensor]:
    leaf = embeddings.clone().requires_grad_()
    value = loss(leaf, *rest)
    return [value.detach(), *torch.autograd.grad(value, [leaf, loss.proxies])]


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def by_proxy(loss: Any, embeddings: Tensor, labels: Labels, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition of `ProxyAnchorLoss`, in loops: both costs of every proxy."""
    weight = torch.ones(len(labels), dtype=embeddings.dtype) if weight is None else weight
    costs: list[list[Tensor]] = [[], []]
    for c in range(C):
        sums = [torch.ones((), dtype=embeddings.dtype), torch.ones((), dtype=embeddings.dtype)]
        for a in range(len(labels)):
            s = F.cosine_similarity(embeddings[a], loss.proxies[c], dim=0)
            if labels[a] == c:
                sums[0] = sums[0] + (-loss.alpha * (s - loss.margin) + weight[a] - 1).exp()
            else:
                sums[1] = sums[1] + (loss.alpha * (s + loss.margin) + weight[a] - 1).exp()
        for side, total in zip(costs, sums, strict=True):
            side.append(total.log())
    return torch.stack(costs[0]), torch.stack(costs[1])


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("mined", [False, True])
def test_proxy_anchor_is_its_definition(bounds: Bounds | None, mined: bool) -> None:
    """However the proxies fall into blocks, what is divided by is of all of them."""
    loss, (embeddings, labels) = made("ProxyAnchorLoss", margin=0.2, alpha=5), batch()
    indices = (torch.tensor([0, 0, 4]), torch.tensor([1, 2, 0]), torch.tensor([3, 8, 8]))
    weight = torch.tensor([3, 1, 1, 1, 1, 0, 0, 0, 2], dtype=torch.float64) / 3
    leaf = embeddings.clone().requires_grad_()
    far, near = by_proxy(loss, leaf, labels, weight if mined else None)
    wanted = far.sum() / len(labels.unique()) + near.sum() / C
    gradients = torch.autograd.grad(wanted, [leaf, loss.proxies])
    with engine.using("dense" if bounds is None else "tiled", bounds):
        found = answer(loss, embeddings, labels, *([indices] if mined else []))
    same(found, [wanted.detach(), *gradients])


@pytest.mark.parametrize("bounds", BOUNDS)
def test_proxy_anchor_weighs_a_proxy_by_its_own_class(bounds: Bounds | None) -> None:
    """PML looks up the labels of the embeddings at the proxies' places."""
    weights = torch.linspace(0.5, 3, C, dtype=torch.float64)
    loss = made("ProxyAnchorLoss", reducer=reducers.ClassWeightedReducer(weights))
    far, near = by_proxy(loss, *batch())
    with engine.using("dense" if bounds is None else "tiled", bounds):
        same(loss(*batch()), (far * weights).mean() + (near * weights).mean())


def test_proxy_anchor_reduces_its_two_parts_apart() -> None:
    both = reducers.MultipleReducers({"pos_loss": reducers.AvgNonZeroReducer(), "neg_loss": reducers.SumReducer()})
    loss = made("ProxyAnchorLoss", reducer=both)
    far, near = by_proxy(loss, *batch())
    same(loss(*batch()), far[far > 0].mean() + near.sum())


@pytest.mark.parametrize("bounds", BOUNDS)
def test_proxy_nca_is_a_softmax_of_distances(bounds: Bounds | None) -> None:
    loss, (embeddings, labels) = made("ProxyNCALoss", softmax_scale=2), batch()
    leaf = embeddings.clone().requires_grad_()
    unit, proxies = F.normalize(leaf, dim=1), F.normalize(loss.proxies, dim=1)
    wanted = F.cross_entropy(-2 * (unit[:, None] - proxies).square().sum(2), labels)
    gradients = torch.autograd.grad(wanted, [leaf, loss.proxies])
    with engine.using("dense" if bounds is None else "tiled", bounds):
        same(answer(loss, embeddings, labels), [wanted.detach(), *gradients])


def test_proxy_nca_counts_what_is_named_as_an_anchor() -> None:
    loss, (embeddings, labels) = made("ProxyNCALoss"), batch()
    theirs = pml_losses.ProxyNCALoss(C, D).double()
    theirs.load_state_dict(loss.state_dict())
    for indices in ([[0, 0, 4], [1, 2, 0], [3, 8, 8]], [[0, 1], [1, 0], [2, 2, 2], [3, 4, 5]]):
        named = tuple(torch.tensor(index) for index in indices)
        same(answer(loss, embeddings, labels, named), answer(theirs, embeddings, labels, named))


def test_proxy_nca_sees_an_embedding_however_far_off_it_is() -> None:
    """PML leaves it out where its probability is less than the dtype's smallest number."""
    loss, embedding = losses.ProxyNCALoss(2, 2, softmax_scale=100), torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss.proxies.data.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    value = loss(embedding, torch.tensor([0]))
    assert value.item() == pytest.approx(400)
    theirs = pml_losses.ProxyNCALoss(2, 2, softmax_scale=100)
    theirs.load_state_dict(loss.state_dict())
    assert not theirs(embedding.detach(), torch.tensor([0])) > 0


def test_proxies_give_distances_as_logits() -> None:
    embeddings, _ = batch()
    for name, distance in (("ProxyNCALoss", distances.LpDistance(power=2)), ("ProxyAnchorLoss", None)):
        loss = made(name)
        wanted = (distance or distances.CosineSimilarity())(embeddings, loss.proxies)
        same(loss.get_logits(embeddings), wanted)
