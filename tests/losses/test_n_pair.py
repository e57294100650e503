"""NPairLoss: one random pair of each class, against a loop over them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gradbank import losses, regularizers
from gradbank.losses.n_pair import random_pairs

LABELS = torch.tensor([3, 1, 3, 0, 1, 3, 7, 1, 0, 9])


def embeddings(dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(len(LABELS), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_a_loop(rows: Tensor, pairs: Tensor, tao: float, l2_reg: float) -> Tensor:
    """The definition: each anchor against every positive but its own."""
    rows, total = F.normalize(rows, dim=1), torch.zeros((), dtype=rows.dtype)
    for i, (a, p) in enumerate(pairs.tolist()):
        inside = torch.ones((), dtype=rows.dtype)
        for j, (_, n) in enumerate(pairs.tolist()):
            if i != j:
                inside = inside + (rows[a] @ (rows[n] - rows[p]) / tao).exp()
        total = total + inside.log() + l2_reg * (rows[a] @ rows[a] + rows[p] @ rows[p])
    return total / len(pairs)


@pytest.mark.parametrize("arguments", [{}, {"tao": 0.1}, {"l2_reg": 1.5, "tao": 3.0}])
@pytest.mark.parametrize("pairs", [[[0, 2], [1, 7], [8, 3]], [[5, 0], [4, 1]]])
def test_loss_equals_its_definition(arguments: Any, pairs: Any) -> None:
    loss, chosen = losses.NPairLoss(**arguments), torch.tensor(pairs)
    answers = []
    for compute in (lambda x: loss(x, LABELS, pairs=chosen), lambda x: in_a_loop(x, chosen, loss.tao, loss.l2_reg)):
        leaf = embeddings().requires_grad_()
        value = compute(leaf)
        value.backward()
        answers.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*answers, rtol=1e-10, atol=1e-13)


def test_parts_of_the_original_give_the_same_loss() -> None:
    torch.manual_seed(3)
    pairs, negatives = losses.NPairLoss.get_n_pairs(LABELS)
    assert pairs.shape == (3, 2)
    assert negatives.tolist() == [[pairs[j, 1] for j in range(3) if j != i] for i in range(3)]
    unit = F.normalize(embeddings(), dim=1)
    anchors, positives = unit[pairs[:, 0]], unit[pairs[:, 1]]
    wanted = losses.NPairLoss.n_pair_loss(anchors, positives, unit[negatives], 0.5)
    wanted = wanted + 0.02 * losses.NPairLoss.l2_loss(anchors, positives)
    found = losses.NPairLoss(tao=0.5)(embeddings(), pairs=pairs)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_a_pair_of_every_label_that_two_rows_have_is_drawn() -> None:
    seen = set()
    for seed in range(200):
        pairs = random_pairs(LABELS, torch.Generator().manual_seed(seed))
        assert LABELS[pairs[:, 0]].tolist() == LABELS[pairs[:, 1]].tolist() == [0, 1, 3]
        assert bool((pairs[:, 0] != pairs[:, 1]).all())
        seen.update(map(tuple, pairs.tolist()))
    assert len(seen) == 2 + 3 * 2 + 3 * 2  # every ordered pair of each of the three


def test_one_seed_gives_one_loss() -> None:
    loss = losses.NPairLoss()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(loss(embeddings(), LABELS))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_generator_draws_in_place_of_the_global_one() -> None:
    loss, state = losses.NPairLoss(), torch.get_rng_state()
    drawn = [loss(embeddings(), LABELS, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), state)
    wanted = loss(embeddings(), LABELS, pairs=random_pairs(LABELS, torch.Generator().manual_seed(4)))
    assert torch.equal(drawn[0], wanted)


def test_labels_may_be_called_target() -> None:
    loss, seed = losses.NPairLoss(), torch.Generator().manual_seed
    named = loss(embeddings(), target=LABELS, generator=seed(0))
    assert torch.equal(named, loss(embeddings(), LABELS, generator=seed(0)))


def test_without_a_pair_the_loss_is_zero_and_backpropagates() -> None:
    leaf = embeddings().requires_grad_()
    value = losses.NPairLoss()(leaf, torch.arange(len(LABELS)))
    value.backward()
    assert float(value.detach()) == 0
    assert leaf.grad is not None
    assert not leaf.grad.any()


def test_a_single_pair_costs_the_constant() -> None:
    value = losses.NPairLoss(l2_reg=0.25)(embeddings(), pairs=torch.tensor([[4, 1]]))
    assert float(value) == pytest.approx(0.5)


def test_many_pairs_are_compared_in_bounded_memory() -> None:
    """The engine of the softmax sees an anchor for each pair, and computes them in tiles."""
    torch.manual_seed(0)
    rows = torch.randn(2400, 3)
    pairs = torch.arange(2400).view(-1, 2)
    unit = F.normalize(rows.double(), dim=1)
    logits = unit[pairs[:, 0]] @ unit[pairs[:, 1]].T
    wanted = F.cross_entropy(logits, torch.arange(1200)) + 0.04
    assert float(losses.NPairLoss()(rows, pairs=pairs)) == pytest.approx(float(wanted), rel=1e-5)


def test_half_precision_is_computed_in_float32() -> None:
    pairs = torch.tensor([[0, 2], [1, 7]])
    leaf = embeddings(torch.float16).requires_grad_()
    value = losses.NPairLoss(tao=0.01)(leaf, pairs=pairs)
    value.backward()
    assert torch.equal(value.detach(), losses.NPairLoss(tao=0.01)(embeddings(torch.float16).float(), pairs=pairs))
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float16


def test_a_regularizer_is_added() -> None:
    plain, cost = losses.NPairLoss(), regularizers.LpRegularizer()
    with_cost = losses.NPairLoss(embedding_regularizer=cost, embedding_reg_weight=0.5)
    pairs = torch.tensor([[0, 2], [1, 7]])
    wanted = plain(embeddings(), pairs=pairs) + cost(embeddings()) * 0.5
    assert math.isclose(float(with_cost(embeddings(), pairs=pairs)), float(wanted))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs labels, or pairs"),
        ({"labels": LABELS, "indices_tuple": (LABELS,) * 3}, "pass pairs, .* not an indices_tuple"),
        ({"labels": LABELS[:4]}, r"labels must be \(10,\)"),
        ({"pairs": torch.zeros(3, dtype=torch.int64)}, r"pairs must be \(n, 2\)"),
        ({"pairs": torch.tensor([[0, 10]])}, r"rows 0 to 10, but must stay within 0\.\.9"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.NPairLoss()(embeddings(), **arguments)


def test_a_temperature_must_be_positive() -> None:
    with pytest.raises(ValueError, match="must be positive, got 0"):
        losses.NPairLoss(tao=0)
