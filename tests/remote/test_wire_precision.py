"""Embeddings and gradients in half the bytes: what the wire rounds is all that differs."""

import pytest
import torch
from torch import Tensor

import gradbank
from gradbank import losses
from gradbank.errors import InvalidRequest
from gradbank.remote.request import narrowed
from gradbank.remote.ticket import NO_NEWS
from gradbank.v1 import step_pb2, tensor_pb2
from gradbank.wire import describe

DTYPES = {torch.bfloat16: 8, torch.float16: 11}  # significant bits


def batch(seed: int, rows: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 16, generator=generator, dtype=dtype), torch.arange(rows) % 4


@pytest.mark.parametrize("wire", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_loss_is_that_of_the_rounded_batch_and_its_gradient_is_rounded_once(
    anyway: gradbank.Client, name: str, wire: torch.dtype, dtype: torch.dtype
) -> None:
    here = losses.CrossBatchMemory(losses.NTXentLoss(), 16, 50)
    there = anyway.open(name, here, wire=wire)
    for seed in range(4):
        rows, labels = batch(seed, dtype=dtype)
        far = rows.clone().requires_grad_()
        near = rows.to(wire).float().requires_grad_()
        values = there(far, labels), here(near, labels)
        for value in values:
            value.backward()
        assert torch.equal(values[0], values[1])
        assert far.grad is not None
        assert near.grad is not None
        assert far.grad.dtype == dtype
        error, bound = (far.grad - near.grad).abs(), near.grad.abs() * 2.0 ** -DTYPES[wire]
        assert bool((error <= bound + near.grad.abs().max() * 2.0**-28).all())  # the least that float16 tells apart
        assert bool((error > 0).any())


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_gradients_of_any_size_keep_their_digits_in_float16(anyway: gradbank.Client, name: str, scale: float) -> None:
    here = losses.ContrastiveLoss(pos_margin=0, neg_margin=1, distance=gradbank.distances.LpDistance(power=1))
    multiplied = losses.MultipleLosses([here], weights=[scale])
    there = anyway.open(name, multiplied, wire=torch.float16)
    rows, labels = batch(0)
    far, near = rows.clone().requires_grad_(), rows.half().float().requires_grad_()
    there(far, labels).backward()
    multiplied(near, labels).backward()
    assert torch.allclose(far.grad, near.grad, rtol=2.0**-11, atol=float(near.grad.abs().max()) * 2.0**-28)  # type: ignore[arg-type,union-attr]


def test_references_are_rounded_likewise(anyway: gradbank.Client, name: str) -> None:
    here, (rows, labels), (ref, _) = losses.NTXentLoss(), batch(0), batch(1, 40)
    there = anyway.open(name, here, wire=torch.bfloat16)
    far = [each.clone().requires_grad_() for each in (rows, ref)]
    near = [each.bfloat16().float().requires_grad_() for each in (rows, ref)]
    for loss_fn, (first, second) in ((there, far), (here, near)):
        loss_fn(first, labels, ref_emb=second, ref_labels=torch.arange(40) % 4).backward()
    for a, b in zip(far, near):
        assert torch.equal(a.grad, b.grad.bfloat16().float())  # type: ignore[arg-type,union-attr]


def test_half_the_bytes_are_sent_and_received(anyway: gradbank.Client, name: str) -> None:
    rows = torch.randn(512, 64).requires_grad_()
    sizes = {}
    for wire in (None, torch.bfloat16):
        there = anyway.open(f"{name}-{wire}", losses.NTXentLoss(), wire=wire)
        there(rows, torch.arange(512) % 8).backward()
        stats = anyway.stats(f"{name}-{wire}")
        sizes[wire] = stats.received_bytes, stats.sent_bytes
    labels = 512 * 8
    assert sizes[None] == (rows.nbytes + labels, rows.nbytes)
    assert sizes[torch.bfloat16] == (rows.nbytes // 2 + labels, rows.nbytes // 2)
    assert "in torch.bfloat16 on the wire" in repr(there)


def test_labels_and_indices_are_narrowed_only_where_they_stay_the_same() -> None:
    for dtype in (torch.uint8, torch.int8, torch.int16):
        assert narrowed(torch.ones(3, dtype=dtype)).dtype == torch.int32
    many = torch.arange(5000)
    assert narrowed(many).dtype == torch.int32
    assert torch.equal(narrowed(many).long(), many)
    for edge in (2**31, -(2**31) - 1):
        many[7] = edge
        assert narrowed(many) is many
    assert narrowed(torch.arange(5)).dtype == torch.int64


def test_named_triplets_that_were_narrowed_are_those_that_were_named(anyway: gradbank.Client, name: str) -> None:
    here, (rows, labels) = losses.TripletMarginLoss(), batch(0, 64)
    there = anyway.open(name, here)
    triplets = gradbank.miners.TripletMarginMiner(margin=5.0)(rows, labels)
    assert len(triplets[0]) > 4096
    leaves = [rows.clone().requires_grad_() for _ in range(2)]
    values = [loss_fn(leaf, labels, triplets) for loss_fn, leaf in zip((there, here), leaves)]
    for value in values:
        value.backward()
    assert torch.equal(*values)
    assert torch.equal(leaves[0].grad, leaves[1].grad)  # type: ignore[arg-type]
    beyond = (triplets[0] + 2**40, *triplets[1:])
    with pytest.raises(InvalidRequest, match=r"index|indices|anchor"):
        there(rows, labels, beyond)


def test_another_dtype_is_refused(anyway: gradbank.Client, name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"wire must be torch.bfloat16, torch.float16 or None, got torch.int8"):
        anyway.open(name, losses.NTXentLoss(), wire=torch.int8)
    there = anyway.open(name, losses.NTXentLoss())
    message, data = describe(batch(0)[0])
    step = step_pb2.StepInput(embeddings=message, gradient_dtype=tensor_pb2.DTYPE_INT32)
    deadline = there.producer.deadline()
    with pytest.raises(InvalidRequest, match="gradient_dtype must be bfloat16 or float16"):
        there.producer.result(there.producer.submit(step, [data], NO_NEWS, deadline), deadline)


def test_gradients_that_no_factor_brings_near_stay_finite_in_float16(client: gradbank.Client, name: str) -> None:
    rows, labels = batch(0)
    rows.requires_grad_()
    loss = losses.MultipleLosses([losses.ContrastiveLoss()], weights=[1e-36])
    client.open(name, loss, wire=torch.float16)(rows, labels).backward()
    assert rows.grad is not None
    assert bool(rows.grad.isfinite().all())
    assert bool(rows.grad.any())
