"""Losses keep their digits, whatever the code around them does."""

import copy
from typing import Any

import pytest
import torch

import gradbank
from gradbank import engine, losses, miners
from gradbank.distances import CosineSimilarity
from gradbank.engine import Anchors, Each, LogSumExp, Part, Statistic
from gradbank.losses import PairLoss
from gradbank.losses.pair import softplus

HERE = torch.empty(0).device  # as --device has it
LOSSES = [
    losses.NTXentLoss(),
    losses.ContrastiveLoss(),
    losses.TripletMarginLoss(distance=CosineSimilarity()),
    losses.CrossBatchMemory(losses.SupConLoss(), 16, 64, miners.MultiSimilarityMiner()),
]


def batch(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(24, 16, generator=generator).to(dtype).requires_grad_(), torch.arange(24) // 3


@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda loss_fn: type(loss_fn).__name__)
@pytest.mark.parametrize("forced", ["dense", "tiled"])
def test_autocast_is_kept_out(loss_fn: losses.Loss, forced: str) -> None:
    results = []
    for enabled in (False, True):
        fresh, (embeddings, labels) = loss_fn.rebuilt(), batch()
        with engine.using(forced), torch.autocast(HERE.type, enabled=enabled):
            loss = fresh(embeddings, labels)
        loss.backward()
        results.append((loss.detach(), embeddings.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_keep_an_amp_scale(client: gradbank.Client, name: str, dtype: torch.dtype) -> None:
    loss_fn = losses.NTXentLoss(temperature=1.0)
    grads = []
    for each in (client.open(name, loss_fn), loss_fn):
        embeddings, labels = batch(dtype=dtype)
        loss = each(embeddings, labels)
        assert loss.dtype == torch.float32
        (loss * 65536.0).backward()
        grads.append(embeddings.grad)
    assert torch.equal(*grads)
    assert bool(grads[0].isfinite().all())


def test_a_memory_used_in_inference_mode_can_be_trained_through() -> None:
    bank = losses.CrossBatchMemory(losses.NTXentLoss(), 16, 64)
    with torch.inference_mode():
        for seed in range(2):
            bank(*batch(seed))
    embeddings, labels = batch(2)
    bank(embeddings, labels).backward()
    assert embeddings.grad is not None
    assert len(bank) == 64


class TwoSums(PairLoss):
    """Two statistics of the same tile."""

    def negatives(self, anchors: Anchors) -> dict[str, Statistic]:
        return {"plain": Each(lambda s: s), "square": Each(lambda s: s * s)}

    def terms(self, anchors: Anchors) -> dict[str, Part]:
        return {name: anchors.per_negative(name) for name in anchors.found}


def test_a_statistic_leaves_the_tile_to_the_next() -> None:
    embeddings, labels = batch()
    indices = miners.MultiSimilarityMiner()(embeddings, labels)
    values = []
    for forced in ("dense", "tiled"):
        with engine.using(forced):
            values.append(TwoSums()(embeddings, labels, indices))
    torch.testing.assert_close(*values)


class LearnedTemperature(PairLoss):
    """NT-Xent with a temperature that is a parameter, in the statistic and in the term."""

    def __init__(self) -> None:
        super().__init__(distance=CosineSimilarity())
        self.log_temperature = torch.nn.Parameter(torch.tensor(-1.0))

    def _logit(self, s: torch.Tensor) -> torch.Tensor:
        return s / self.log_temperature.exp()

    def negatives(self, anchors: Anchors) -> dict[str, Statistic]:
        return {"near": LogSumExp(self._logit)}

    def terms(self, anchors: Anchors) -> dict[str, Part]:
        near = anchors.each(anchors.found["near"].value)
        return {"loss": anchors.per_positive(softplus(near - self._logit(anchors.s)))}


@pytest.mark.parametrize("forced", ["dense", "tiled"])
def test_a_parameter_of_ones_own_gets_its_gradient(forced: str) -> None:
    embeddings, labels = batch()
    loss_fn, slope = LearnedTemperature(), []
    with engine.using(forced, engine.Bounds(tile=100, rows=7)):
        value = loss_fn(embeddings, labels)
        value.backward()
        for step in (-1e-3, 2e-3):
            loss_fn.log_temperature.data += step
            slope.append(loss_fn(embeddings.double(), labels).item())
    temperature = torch.tensor(-1.0).exp().item()
    torch.testing.assert_close(value.detach(), losses.NTXentLoss(temperature)(embeddings, labels).detach())
    assert loss_fn.log_temperature.grad is not None
    assert loss_fn.log_temperature.grad.item() == pytest.approx((slope[1] - slope[0]) / 2e-3, rel=1e-3)


def test_ref_labels_without_ref_emb_are_refused_here_and_there(client: gradbank.Client, name: str) -> None:
    embeddings, labels = batch()
    loss_fn = losses.ContrastiveLoss()
    for each in (loss_fn, client.open(name, loss_fn)):
        with pytest.raises(ValueError, match="pass both, or neither"):
            each(embeddings, labels, ref_labels=labels.flip(0))


def test_gradients_of_gradients_are_refused_rather_than_dropped() -> None:
    embeddings, labels = batch()
    with pytest.raises(RuntimeError, match="no gradients of gradients"):
        torch.autograd.grad(losses.NTXentLoss()(embeddings, labels), embeddings, create_graph=True)


@pytest.mark.parametrize("kind", ["dense", "tiled"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.ArcFaceLoss(4, 6),
        lambda: losses.SoftTripleLoss(4, 6),
        lambda: losses.MarginLoss(learn_beta=True, num_classes=4),
        lambda: losses.MultipleLosses([losses.ProxyAnchorLoss(4, 6)]),
    ],
)
def test_a_hook_of_a_weight_runs_once_in_the_backward_pass(make: Any, kind: str) -> None:
    torch.manual_seed(0)
    plain = make()
    hooked, embeddings, labels = copy.deepcopy(plain), torch.randn(12, 6), torch.arange(12) % 4
    seen = []
    for weight in hooked.parameters():
        weight.register_hook(lambda gradient: seen.append(1) or 2 * gradient)
    with engine.using(kind):
        hooked(embeddings, labels)  # a call before does not leave another hook behind
        loss, other = hooked(embeddings, labels), plain(embeddings, labels)
    assert seen == []
    for each in (loss, other):
        each.backward()
    for doubled, weight in zip(hooked.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(doubled.grad, 2 * weight.grad)
    assert len(seen) == len(list(hooked.parameters()))
