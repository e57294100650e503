"""Payloads in pieces: every byte arrives, in the step it belongs to, whatever the sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradbank
from gradbank import losses
from gradbank.errors import InvalidRequest
from gradbank.wire import CHUNK_BYTES, Assembly, chunks


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(1, 17))
def test_pieces_are_full_but_for_the_last_and_hold_every_byte(buffers: list[bytes], size: int) -> None:
    pieces = [b"".join(parts) for parts in chunks([memoryview(b) for b in buffers], size)]
    assert b"".join(pieces) == b"".join(buffers)
    assert all(len(piece) == size for piece in pieces[:-1])
    assert pieces == [b""] or all(pieces), "an empty piece would be taken for the next message"


def test_more_bytes_than_announced_are_refused() -> None:
    payload = Assembly(3)
    payload.add(b"ab")
    assert not payload.complete
    with pytest.raises(InvalidRequest, match="a payload of 3 bytes was announced, and at least 4 came"):
        payload.add(b"cd")
    with pytest.raises(InvalidRequest, match="a payload of 3 bytes was announced, and 2 came"):
        payload.payload()


# float32 rows of 256 are 1 KiB: gradients of just below, exactly and just above whole chunks
@pytest.mark.parametrize("rows", [1023, 1024, 1025, 2048])
def test_steps_around_whole_chunks_are_answered_in_order(client: gradbank.Client, name: str, rows: int) -> None:
    assert CHUNK_BYTES == 1024 * 256 * 4
    there, here = client.open(name, losses.ContrastiveLoss()), losses.ContrastiveLoss()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        embeddings, labels = torch.randn(rows, 256, generator=generator), torch.arange(rows) // 2
        leaves = [embeddings.clone().requires_grad_() for _ in range(2)]
        values = [loss_fn(leaf, labels) for loss_fn, leaf in zip((there, here), leaves)]
        for value in values:
            value.backward()
        assert torch.equal(*values)
        assert torch.equal(*(leaf.grad for leaf in leaves))


@pytest.mark.parametrize("columns", [254, 255, 256])
def test_requests_of_whole_chunks_leave_the_stream_usable(client: gradbank.Client, name: str, columns: int) -> None:
    # 1024 rows of embeddings and labels: with 254 columns of float32, exactly one chunk
    there, here = client.open(name, losses.ContrastiveLoss()), losses.ContrastiveLoss()
    for seed in range(3):
        torch.manual_seed(seed)
        embeddings, labels = torch.randn(1024, columns), torch.arange(1024) // 2
        assert torch.equal(there(embeddings, labels), here(embeddings, labels))
