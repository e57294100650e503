"""What is learned gets its gradient whatever the engine makes of a loss: in tiles the same as of the whole matrix."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import gradbank
from gradbank import distances, engine, losses
from gradbank.component import component

SMALL = engine.Bounds(tile=200, rows=8)
D = 8


@component
class FarMargin(losses.CosFaceLoss):
    """A margin of each class, which is learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.margins = nn.Parameter(torch.full((self.num_classes,), 0.3))

    def with_margin(self, z: Tensor, anchors: Any) -> Tensor:
        assert anchors.labels is not None
        return z - self.scale * self.margins[anchors.labels]


@component
class MarginAgain(losses.MarginLoss):
    """Writes half of a formula anew."""

    def terms(self, anchors: Any) -> Any:
        return super().terms(anchors)


@component
class CircleAgain(losses.CircleLoss):
    """Writes half of a formula anew."""

    def terms(self, anchors: Any) -> Any:
        return super().terms(anchors)


@component
class OwnKernel(losses.PairLoss):
    """A function of triplets that is learned."""

    def __post_init__(self) -> None:
        self.weight = nn.Parameter(torch.tensor(1.3))

    def cost(self, near: Tensor, far: Tensor) -> Tensor:
        return nn.functional.softplus(self.weight * (near - far))

    def negatives(self, anchors: Any) -> Any:
        return {"loss": engine.Triplets(self.cost)}

    def terms(self, anchors: Any) -> Any:
        return {"loss": anchors.per_triplet("loss")}


@component
class OwnRamps(losses.PairLoss):
    """Two ramps, one of which is learned."""

    def __post_init__(self) -> None:
        self.far = nn.Parameter(torch.tensor(1.2))

    def negatives(self, anchors: Any) -> Any:
        return {"loss": engine.Separable(engine.Ramp(1.0, -0.3), engine.Ramp(-1.0, self.far))}

    def terms(self, anchors: Any) -> Any:
        return {"loss": anchors.per_triplet("loss")}


@component
class MadeOnce(losses.PairLoss):
    """Computes something of its parameter as it is declared."""

    def __post_init__(self) -> None:
        self.log_t = nn.Parameter(torch.tensor(-1.0))

    def negatives(self, anchors: Any) -> Any:
        scale = (-self.log_t).exp()
        return {"near": engine.LogSumExp(lambda s: -s * scale)}

    def terms(self, anchors: Any) -> Any:
        return {"loss": anchors.per_positive(anchors.each(anchors.found["near"].value) + anchors.s)}


@component
class FromABuffer(losses.PairLoss):
    """Has something that is learned elsewhere for a buffer."""

    def __post_init__(self) -> None:
        self.log_scale = nn.Parameter(torch.tensor(0.2))

    def negatives(self, anchors: Any) -> Any:
        return {"near": engine.LogSumExp(lambda s: -s * self.scale)}

    def terms(self, anchors: Any) -> Any:
        self_s = anchors.s * self.scale
        return {"loss": anchors.per_positive(anchors.each(anchors.found["near"].value) + self_s)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.register_buffer("scale", self.log_scale.exp(), persistent=False)
        return super().forward(*args, **kwargs)


def with_parameter(loss: Any, name: str, value: float) -> Any:
    setattr(loss, name, nn.Parameter(torch.tensor(value)))
    return loss


MADE: dict[str, Callable[[], Any]] = {
    "a margin of each class": lambda: FarMargin(50, D),
    "MarginLoss, half anew": lambda: with_parameter(MarginAgain(), "margin", 0.2),
    "CircleLoss, half anew": lambda: with_parameter(CircleAgain(), "gamma", 8.0),
    "a kernel": OwnKernel,
    "ramps": OwnRamps,
    "made once": MadeOnce,
    "a buffer": FromABuffer,
    "a parametrized weight": lambda: parametrizations.weight_norm(losses.LargeMarginSoftmaxLoss(50, D), "W"),
}


def gradients(make: Callable[[], Any], way: str, referred: bool) -> list[Tensor]:
    torch.manual_seed(0)
    embeddings, labels, loss_fn = torch.randn(40, D).double(), torch.arange(40) % 20, make().double()
    if loss_fn.learns_references:
        labels = torch.arange(40)
    given = (embeddings, labels)
    if referred:
        given = (*given, None, embeddings.flip(0) + 0.1, labels.flip(0))
    with engine.using(way, SMALL if way == "tiled" else None):
        loss = loss_fn(*given)
    return list(torch.autograd.grad(loss, [each for each in loss_fn.parameters() if each.requires_grad]))


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("referred", [False, True], ids=["in the batch", "with references"])
def test_tiles_give_what_is_learned_the_gradient_of_the_matrix(name: str, referred: bool) -> None:
    if referred and MADE[name]().learns_references:
        pytest.skip("takes no references")
    whole, tiled = (gradients(MADE[name], way, referred) for way in ("dense", "tiled"))
    assert any(bool(each.any()) for each in whole)
    torch.testing.assert_close(tiled, whole, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", ["softmax", "list", "tuple", "dict"])
def test_weights_of_several_losses_are_learned_however_they_are_made(form: str, nested: bool) -> None:
    torch.manual_seed(0)
    embeddings, labels, logits = torch.randn(32, D), torch.arange(32) // 4, torch.zeros(2, requires_grad=True)
    shares, parts = logits.softmax(0), {"a": losses.NTXentLoss(), "b": losses.ContrastiveLoss()}
    values = [each(embeddings, labels).detach() for each in parts.values()]
    if form == "dict":
        made = losses.MultipleLosses(parts, weights=dict(zip(parts, shares)))
    else:
        given = {"softmax": shares, "list": list(shares), "tuple": tuple(shares)}[form]
        made = losses.MultipleLosses(list(parts.values()), weights=given)
    loss_fn = losses.MultipleLosses([made]) if nested else made
    (found,) = torch.autograd.grad(loss_fn(embeddings, labels), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad((logits.softmax(0) * torch.stack(values)).sum(), logits)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(loss_fn(embeddings, labels), logits)[0], wanted)


@pytest.mark.parametrize("second", [lambda b: b + 1, lambda b: b * 2])
def test_weights_made_of_each_other_are_counted_once(second: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    loss_fn = losses.MultipleLosses([losses.ArcFaceLoss(50, D), losses.NormalizedSoftmaxLoss(50, D)]).double()
    embeddings, labels = torch.randn(40, D).double(), torch.arange(40)
    base = torch.randn(D, 50).double().requires_grad_()

    def loss(base: Tensor) -> Tensor:
        weights = {"losses.0.W": base, "losses.1.W": second(base)}
        return functional_call(loss_fn, weights, (embeddings, labels))

    (found,) = torch.autograd.grad(loss(base), base)
    direction = torch.randn(D, 50).double()
    step = 1e-6 * direction
    with torch.no_grad():
        wanted = (loss(base + step) - loss(base - step)) / 2e-6
    assert (found * direction).sum().item() == pytest.approx(wanted.item(), rel=1e-6)


@component
class Idle(losses.PairLoss):
    """Has a parameter that it makes nothing of."""

    def __post_init__(self) -> None:
        self.used, self.idle = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def terms(self, anchors: Any) -> Any:
        return {"loss": anchors.per_positive(anchors.s * self.used)}


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_server_leaves_weights_that_no_loss_reaches(name: str) -> None:
    embeddings, labels, here = torch.randn(8, 4), torch.arange(8) // 2, Idle()
    local = getattr(torch.optim, name)(here.parameters(), lr=0.1, weight_decay=0.5)
    with gradbank.connect("local://") as client:
        there = client.open("idle", Idle())
        optimizer = there.optimizer(name, lr=0.1, weight_decay=0.5)
        for _ in range(3):
            for loss_fn, stepped in ((there, optimizer), (here, local)):
                loss_fn(embeddings, labels).backward()
                stepped.step()
                stepped.zero_grad()
        made = there.local()
        assert made.idle.item() == here.idle.item() == 1
        torch.testing.assert_close(made.used, here.used)


def test_what_an_anchor_of_proxies_does_not_call_is_refused() -> None:
    with pytest.raises(TypeError, match="overrides terms, which ProxyAnchorLoss does not call"):
        type("Own", (losses.ProxyAnchorLoss,), {"terms": lambda self, anchors: {}})


@component
class WritesDown(distances.LpDistance):
    """Keeps what it made of its parameter in a buffer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.log_scale = nn.Parameter(torch.zeros(D))
        self.register_buffer("scale", torch.ones(D), persistent=False)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        self.scale = self.log_scale.exp()
        return torch.cdist(query_emb * self.scale, ref_emb * self.scale)


@pytest.mark.parametrize("way", ["dense", "tiled"])
def test_what_a_call_writes_down_is_not_taken_for_learned_by_the_next(way: str) -> None:
    torch.manual_seed(0)
    loss_fn, found = losses.ContrastiveLoss(distance=WritesDown()), []
    embeddings, labels = torch.randn(40, D), torch.arange(40) % 20
    for _ in range(4):
        with engine.using(way, SMALL if way == "tiled" else None):
            loss = loss_fn(embeddings, labels)
        found.append(torch.autograd.grad(loss, loss_fn.distance.log_scale)[0])
    assert bool(found[0].any())
    assert all(each.equal(found[0]) for each in found)


FORKS = """
import os, threading, time, torch
from torch import nn
from gradbank import losses


def step():
    loss_fn = losses.NTXentLoss()
    loss_fn.temperature = nn.Parameter(torch.tensor(-2.0)).exp()
    loss_fn(torch.randn(16, 8), torch.arange(16) // 4)


def go_on():
    while not over:
        step()


over = False
torch.set_num_threads(1)
threads = [threading.Thread(target=go_on) for _ in range(2)]
for each in threads:
    each.start()
for _ in range(10):
    child = os.fork()
    if child == 0:
        step()
        os._exit(0)
    until = time.monotonic() + 20
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > until:
            os.kill(child, 9)
            print("hangs")
            os._exit(1)
        time.sleep(0.01)
over = True
"""


def test_a_forked_child_computes_though_other_threads_did() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr


def test_learned_kernels_and_ramps_take_the_memory_of_a_tile() -> None:
    """Of 20 anchors with 500 positives each against 10,000 references: ten million triplets, of 400 MB."""
    measured = """
import resource, torch
from gradbank import component, engine, losses
from torch import nn
torch.set_num_threads(1)


@component
class Ramps(losses.PairLoss):
    def __post_init__(self):
        self.far = nn.Parameter(torch.tensor(1.2))

    def negatives(self, anchors):
        return {"loss": engine.Separable(engine.Ramp(1.0, -0.3), engine.Ramp(-1.0, self.far))}

    def terms(self, anchors):
        return {"loss": anchors.per_triplet("loss")}


def step(references):
    given = torch.randn(20, 8), torch.arange(20), None, torch.randn(references, 8), torch.arange(references) % 20
    loss_fn = Ramps()
    loss_fn(*given).backward()
    assert loss_fn.far.grad


step(600)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(10_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", measured], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 250
