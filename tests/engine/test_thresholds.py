"""Where values fall among thresholds: as a plain search says, whatever lies crowded, far away or nowhere."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradbank.engine.thresholds
from gradbank.engine import Buckets, first_not_above

LIMIT = torch.finfo(torch.float32).max


def searched(anchors: int, anchor: Tensor, thresholds: Tensor, values: Tensor) -> Tensor:
    """`(b, w)`: how many of its anchor's thresholds each value is not below, one comparison at a time."""
    own = anchor == torch.arange(anchors)[:, None]
    return (own[:, None, :] & (thresholds <= values[:, :, None])).sum(2)


def found(buckets: Buckets, values: Tensor) -> Tensor:
    return buckets.find(values).long() - torch.arange(len(values))[:, None] * buckets.size


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.data())
def test_each_value_is_put_where_a_plain_search_puts_it(data: st.DataObject) -> None:
    anchors = data.draw(st.integers(1, 5))
    number = data.draw(st.integers(0, 40))
    seed = data.draw(st.integers(0, 10**6))
    spread = data.draw(st.sampled_from([1e-30, 1e-6, 0.1, 1.0, 1e30]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    cells = data.draw(st.sampled_from([1, 4, 128]))
    generator = torch.Generator().manual_seed(seed)
    anchor = torch.randint(anchors, (number,), generator=generator)
    thresholds = 1 + spread * torch.randn(number, dtype=dtype, generator=generator)
    if data.draw(st.booleans()) and number:  # several alike
        thresholds[::2] = thresholds[0].clone()
    values = 1 + spread * torch.randn(anchors, data.draw(st.integers(0, 33)), dtype=dtype, generator=generator)
    if number and values.numel():  # and values that are thresholds
        values.view(-1)[: min(number, values.numel())] = thresholds[: min(number, values.numel())]
    with patch.object(gradbank.engine.thresholds, "_CELLS", cells):
        buckets = Buckets(anchors, anchor, thresholds)
    assert torch.equal(found(buckets, values), searched(anchors, anchor, thresholds, values))


def test_thresholds_and_values_may_lie_beyond_all_numbers() -> None:
    thresholds = torch.tensor([-LIMIT, 0.5, LIMIT, 0.25, -LIMIT])
    anchor = torch.tensor([0, 0, 0, 1, 1])
    values = torch.tensor([-torch.inf, -LIMIT, 0.3, 0.5, LIMIT, torch.inf]).repeat(2, 1)
    assert torch.equal(found(Buckets(2, anchor, thresholds), values), searched(2, anchor, thresholds, values))


def test_what_is_no_number_has_a_bucket_all_the_same() -> None:
    buckets = Buckets(2, torch.tensor([0, 1]), torch.tensor([0.5, 0.6]))
    bucket = buckets.find(torch.full((2, 3), torch.nan))
    assert bool((bucket >= 0).all())
    assert bool((bucket < buckets.table.numel()).all())


def test_the_last_bucket_is_counted_nowhere() -> None:
    buckets = Buckets(2, torch.tensor([0, 0, 1]), torch.tensor([0.2, 0.4, 0.3]))
    bucket = buckets.find(torch.tensor([[0.1, 0.3, 0.5], [0.1, 0.3, 0.5]]))
    assert not bool((bucket == buckets.last).any())
    bucket[:, 1] = buckets.last[:, 0]
    counts = buckets.count(bucket, None)
    assert counts.sum() == 4
    assert buckets.below_each(counts).tolist() == [1, 1, 1]


@pytest.mark.parametrize("strict", [True, False])
def test_the_first_float_that_no_longer_exceeds_is_found_exactly(strict: bool) -> None:
    u = torch.rand(1000) * 3
    bound = 0.0
    t = first_not_above(lambda v: u - v + 0.05, u + 0.05, 8 * torch.finfo(u.dtype).eps * (u + 0.05), bound, strict)
    before = torch.nextafter(t, torch.full_like(t, -torch.inf))
    at, below = u - t + 0.05, u - before + 0.05
    assert not bool((at > bound if strict else at >= bound).any())
    assert bool((below > bound if strict else below >= bound).all())
