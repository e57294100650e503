"""Learnable weights on the server end up where torch's own loop would have put them, bit by bit."""

from collections.abc import Callable

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.errors import InvalidRequest, InvalidUpdate, NonFiniteError, SessionConflict
from gradbank_server.sessions import Backward, Batch, OptimizerSpec, OptimizerStep, ZeroGradient

Hosted = Callable[..., object]
Make = Callable[..., Batch]
STEP, ZERO = OptimizerStep(1.0, {}), ZeroGradient()


def arcface() -> losses.ArcFaceLoss:
    torch.manual_seed(0)
    return losses.ArcFaceLoss(3, 8)


class Pair:
    """A session that learns, and the loss and optimizer that it should agree with."""

    def __init__(self, trainer: object, here: losses.ArcFaceLoss, name: str, **options: object) -> None:
        self.trainer, self.here = trainer, here
        self.optimizer = getattr(torch.optim, name)(here.parameters(), **options)
        trainer.session.configure(OptimizerSpec(name, options))

    def step(self, batch: Batch, *news: object) -> torch.Tensor:
        """Steps the session with news of earlier steps; the loss here, once it is known that both agree."""
        answer = self.trainer.step(learning(batch, *news))
        loss = self.here(batch.embeddings, batch.labels)
        assert torch.equal(answer.loss, loss.detach())
        assert torch.equal(self.trainer.session.state()["W"], self.here.W)
        return loss


def learning(batch: Batch, *news: object) -> Batch:
    return Batch(batch.embeddings, batch.labels, weights_need_gradient=True, weight_events=news)


@pytest.fixture
def pair(hosted: Hosted) -> Callable[..., Pair]:
    def make(name: str = "SGD", **options: object) -> Pair:
        here = arcface()
        return Pair(hosted(here), here, name, **(options or {"lr": 0.1}))

    return make


def weights(trainer: object) -> torch.Tensor:
    return trainer.session.state()["W"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
        ("Adam", {"lr": 0.1, "betas": [0.8, 0.99], "amsgrad": True}),
        ("AdamW", {"lr": 0.1}),
        ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.1}),
        ("Adamax", {"lr": 0.1}),
        ("NAdam", {"lr": 0.1}),
        ("RAdam", {"lr": 0.1}),
        ("RMSprop", {"lr": 0.1, "momentum": 0.5, "centered": True}),
        ("Adadelta", {"lr": 1.0}),
        ("Adafactor", {"lr": 0.1}),
        ("ASGD", {"lr": 0.1, "t0": 2}),
        ("Muon", {"lr": 0.1}),
        ("Rprop", {"lr": 0.1}),
    ],
)
def test_every_optimizer_steps_as_in_torch(pair: Callable[..., Pair], batch: Make, name: str, options: dict) -> None:
    both = pair(name, **options)
    news: tuple = ()
    for seq in range(1, 8):
        loss = both.step(batch(seq), *news)
        both.optimizer.zero_grad()
        loss.backward()
        both.optimizer.step()
        news = (ZERO, Backward(seq, 1.0), STEP)
    assert both.trainer.session.tally.optimizer_steps == 6


def test_backward_passes_add_up_until_zero_grad(pair: Callable[..., Pair], batch: Make) -> None:
    both = pair(lr=0.1, momentum=0.9)
    first, second = both.step(batch(1)), both.step(batch(2))
    (first * 0.5).backward()
    (second * 0.25).backward()
    both.optimizer.step()
    third = both.step(batch(3), Backward(1, 0.5), Backward(2, 0.25), STEP)
    third.backward()  # nobody called zero_grad
    both.optimizer.step()
    both.step(batch(4), Backward(3, 1.0), STEP)
    both.optimizer.zero_grad()
    both.optimizer.step()
    both.step(batch(5), ZERO, STEP)


def test_news_is_carried_out_in_the_order_it_is_told(pair: Callable[..., Pair], batch: Make) -> None:
    both = pair()
    start = weights(both.trainer)
    both.trainer.step(learning(batch(1)))
    both.trainer.step(learning(batch(2), Backward(1, 1.0), ZERO, STEP))
    assert torch.equal(weights(both.trainer), start)  # the gradient was gone before the step
    both.trainer.step(learning(batch(3), ZERO, Backward(2, 1.0), STEP))
    assert not torch.equal(weights(both.trainer), start)


def test_a_scale_that_is_taken_back_changes_nothing(pair: Callable[..., Pair], batch: Make) -> None:
    both = pair("Adam", lr=0.1)
    both.step(batch(1)).backward()
    both.optimizer.step()
    both.step(batch(2), Backward(1, 65536.0), OptimizerStep(1 / 65536, {}))


def test_a_schedule_changes_the_options_of_a_step(pair: Callable[..., Pair], batch: Make) -> None:
    both = pair(lr=0.1, momentum=0.9)
    news: tuple = ()
    for seq, rate in enumerate((0.1, 0.05, 0.4), start=1):
        loss = both.step(batch(seq), *news)
        both.optimizer.zero_grad()
        loss.backward()
        both.optimizer.param_groups[0]["lr"] = rate
        both.optimizer.step()
        news = (ZERO, Backward(seq, 1.0), OptimizerStep(1.0, {"lr": rate}))
    both.step(batch(9), *news)


def test_a_step_without_a_gradient_leaves_the_weights(pair: Callable[..., Pair], batch: Make) -> None:
    both = pair("Adam", lr=0.1, weight_decay=0.5)
    start = weights(both.trainer)
    both.step(batch(1), STEP)
    assert torch.equal(weights(both.trainer), start)


def test_the_gradients_of_the_last_four_steps_of_each_rank_are_kept(hosted: Hosted, batch: Make) -> None:
    first = hosted(arcface())
    second = type(first)(first.session, rank=1)
    for seed in range(1, 6):
        first.step(learning(batch(seed)))
    for seed in range(1, 6):
        second.step(learning(batch(seed)))
    with pytest.raises(InvalidUpdate, match="the weight gradient of step 1 is not kept: call backward at most 3 steps"):
        first.step(learning(batch(6), Backward(1, 1.0)))
    first.step(learning(batch(6), Backward(2, 1.0)))
    with pytest.raises(InvalidUpdate, match=r"step 2 is not kept.* once only"):
        first.step(learning(batch(7), Backward(2, 1.0)))


def test_each_rank_accumulates_and_clears_its_own_gradient(pair: Callable[..., Pair], batch: Make) -> None:
    """Two trainers in turns, two backward passes to a step: as if each step were made here, of its own two."""
    both = pair("SGD", lr=0.1, momentum=0.9)
    trainers = [both.trainer, type(both.trainer)(both.trainer.session, rank=1)]
    told: list[tuple] = [(), ()]
    mine: list[list[torch.Tensor]] = [[], []]
    for turn in range(6):
        for rank, trainer in enumerate(trainers):
            asked = batch(10 * turn + rank)
            answer = trainer.step(learning(asked, *told[rank]))
            if told[rank] and told[rank][-1] is STEP:
                both.here.W.grad = sum(mine[rank])
                both.optimizer.step()
                mine[rank].clear()
            loss = both.here(asked.embeddings, asked.labels)
            assert torch.equal(answer.loss, loss.detach())
            mine[rank].append(torch.autograd.grad(loss, both.here.W)[0])
            backward = Backward(trainer.seq, 1.0)
            told[rank] = (backward, STEP) if turn % 2 else (ZERO, backward)
    torch.testing.assert_close(weights(both.trainer), both.here.W.detach(), rtol=0, atol=0)


def test_a_trainer_that_takes_a_rank_over_starts_without_a_gradient(pair: Callable[..., Pair], batch: Make) -> None:
    both = pair(lr=0.1)
    for seq in (1, 2, 3):
        both.trainer.step(learning(batch(seq), *([Backward(seq - 1, 1.0)] if seq > 1 else [])))
    session = both.trainer.session
    assert session.gradient_bytes == 2 * session.weight_bytes  # two passes added up, and one that was not told
    renewed = type(both.trainer)(session, incarnation=1, nonce=b"a")
    assert (renewed.epoch, renewed.seq) == (1 + both.trainer.epoch - 1, 3)
    assert session.gradient_bytes == 2 * session.weight_bytes  # the same trainer
    heir = type(both.trainer)(session, incarnation=2, nonce=b"b")
    assert session.gradient_bytes == 0
    start = weights(heir)
    heir.step(learning(batch(4)))
    heir.step(learning(batch(5), STEP))
    assert torch.equal(weights(heir), start)  # there was nothing to step with
    heir.step(learning(batch(6), Backward(heir.seq - 1, 1.0), STEP))
    assert not torch.equal(weights(heir), start)


def test_no_gradient_is_kept_of_a_step_that_did_not_ask(hosted: Hosted, batch: Make) -> None:
    trainer = hosted(arcface())
    trainer.step(batch(1))
    with pytest.raises(InvalidUpdate, match="the weight gradient of step 1 is not kept"):
        trainer.step(learning(batch(2), Backward(1, 1.0)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (OptimizerSpec("SDG", {}), "no optimizer is called 'SDG'; did you mean 'SGD'?"),
        (OptimizerSpec("__class__", {}), "no optimizer is called"),
        (OptimizerSpec("SGD", {"lrr": 0.1}), "SGD cannot be made: .*'lrr'"),
        (OptimizerSpec("SGD", {"lr": -1.0}), "SGD cannot be made: Invalid learning rate: -1.0"),
        (OptimizerSpec("Adam", {"lr": 0.1, "foreach": True, "fused": True}), "Adam cannot be made"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_by_name(hosted: Hosted, spec: OptimizerSpec, message: str) -> None:
    trainer = hosted(arcface())
    with pytest.raises(InvalidRequest, match=message):
        trainer.session.configure(spec)
    assert trainer.session.optimizer is None


def test_a_session_has_one_optimizer(pair: Callable[..., Pair]) -> None:
    session = pair().trainer.session
    assert session.configure(OptimizerSpec("SGD", {"lr": 0.1})).name == "SGD"
    with pytest.raises(SessionConflict, match=r"has the optimizer SGD\({'lr': 0.1}\), not SGD\({'lr': 0.2}\)"):
        session.configure(OptimizerSpec("SGD", {"lr": 0.2}))


def test_what_has_no_weights_has_no_optimizer(hosted: Hosted, batch: Make) -> None:
    trainer = hosted(losses.NTXentLoss())
    with pytest.raises(InvalidRequest, match="no learnable weights"):
        trainer.session.configure(OptimizerSpec("SGD", {"lr": 0.1}))
    with pytest.raises(InvalidRequest, match="the session has no optimizer"):
        trainer.step(learning(batch(1), STEP))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrr": 0.1}, "SGD has no option 'lrr'"),
        ({"params": 1}, "SGD has no option 'params'"),
        ({"lr": "fast"}, "lr"),
        ({"momentum": None}, "momentum"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_by_name(
    pair: Callable[..., Pair], batch: Make, options: dict, message: str
) -> None:
    both = pair(lr=0.1, momentum=0.9)
    start = weights(both.trainer)
    both.trainer.step(learning(batch(1)))
    with pytest.raises(InvalidRequest, match=message):
        both.trainer.step(learning(batch(2), Backward(1, 1.0), OptimizerStep(1.0, options)))
    assert torch.equal(weights(both.trainer), start)


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("with_batch", [True, False], ids=["with a batch", "news only"])
def test_a_learning_rate_that_ruins_the_weights_leaves_them_as_they_were(
    pair: Callable[..., Pair], batch: Make, rate: float, with_batch: bool
) -> None:
    both = pair(lr=0.1, momentum=0.9)
    both.trainer.step(learning(batch(1)))
    both.trainer.step(learning(batch(2), Backward(1, 1.0), STEP))
    start = weights(both.trainer)
    news = (Backward(2, 64.0), OptimizerStep(1.0, {"lr": rate}))
    bad = learning(batch(3), *news) if with_batch else Batch(weight_events=news)
    with pytest.raises(InvalidRequest, match=r"(?i)finite|the loss is nan"):
        both.trainer.send(3, bad)
    assert torch.equal(weights(both.trainer), start)
    both.trainer.step(learning(batch(3), Backward(2, 1.0), STEP))
    assert bool(weights(both.trainer).isfinite().all())


# -- the same through a client ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # of a first step that the scaler skips
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "GradScaler"])
def test_a_training_loop_is_the_same_with_the_weights_on_the_server(
    embedded: gradbank.Client, name: str, scaled: bool, batch: Make
) -> None:
    here = arcface()
    there = embedded.open(name, here)
    final = []
    for loss_fn, optimizer in (
        (here, torch.optim.SGD(here.parameters(), lr=0.1, momentum=0.9)),
        (there, there.optimizer("SGD", lr=0.1, momentum=0.9)),
    ):
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        seen = []
        for seed in range(8):
            made = batch(seed)
            loss = loss_fn(made.embeddings, made.labels)
            seen.append(loss.item())
            scaler.scale(loss).backward()
            if seed % 2:  # the gradients of two batches make a step
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                schedule.step()
        final.append(seen)
    assert final[0] == final[1]
    assert torch.equal(there.local().W, here.W)


def test_what_scales_the_token_scales_the_gradient_of_the_weights(
    embedded: gradbank.Client, name: str, batch: Make
) -> None:
    here, made = arcface(), batch(1)
    there = embedded.open(name, here)
    optimizer, local = there.optimizer("SGD", lr=0.1), torch.optim.SGD(here.parameters(), lr=0.1)
    there(made.embeddings, made.labels).backward()
    here(made.embeddings, made.labels).backward()
    optimizer.token.grad.mul_(0.25)
    here.W.grad.mul_(0.25)
    optimizer.step()
    local.step()
    assert torch.equal(there.local().W, here.W)


def test_news_of_a_refused_batch_is_told_with_the_next(embedded: gradbank.Client, name: str, batch: Make) -> None:
    here, made = arcface(), batch(1)
    there = embedded.open(name, here)
    optimizer, local = there.optimizer("SGD", lr=0.1), torch.optim.SGD(here.parameters(), lr=0.1)
    for loss_fn, steps in ((there, optimizer), (here, local)):
        loss_fn(made.embeddings, made.labels).backward()
        steps.step()
    with pytest.raises(NonFiniteError):
        there(made.embeddings * float("nan"), made.labels)
    assert torch.equal(there(made.embeddings, made.labels), here(made.embeddings, made.labels))
    assert embedded.stats(name).optimizer_steps == 1
