"""What only a GPU does: it runs out of a memory of its own, and one bad index ends it for the whole process."""

from collections.abc import Iterator

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.errors import InvalidRequest, LimitExceeded
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")

MIB = 2**20


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[gradbank.Client]:
    settings = ServerSettings(port=0, metrics_port=-1, device="cuda")
    with Server(settings) as running, gradbank.connect(running.address, timeout=60) as connected:
        yield connected


def batch(rows: int, dimension: int = 128, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(rows, dimension, generator=generator).cuda().requires_grad_()
    return embeddings, (torch.arange(rows) // 4).cuda()


def test_a_step_that_does_not_fit_the_gpu_is_refused_and_changes_nothing(on_gpu: gradbank.Client, name: str) -> None:
    loss_fn = on_gpu.open(name, losses.CrossBatchMemory(losses.NTXentLoss(), 128, 2048))
    loss_fn(*batch(64))
    before, large = loss_fn.local().state_dict(), batch(2048, seed=1)
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + MIB) / whole)
    try:
        with pytest.raises(LimitExceeded, match="does not fit the device's memory"):
            loss_fn(*large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    after = loss_fn.local().state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    loss_fn(*large).backward()


def test_a_bad_index_is_refused_before_it_reaches_the_gpu(on_gpu: gradbank.Client, name: str) -> None:
    embeddings, labels = batch(16)
    classes = on_gpu.open(f"{name}-classes", losses.ArcFaceLoss(num_classes=4, embedding_size=128))
    pairs = on_gpu.open(f"{name}-pairs", losses.ContrastiveLoss())
    one = torch.zeros(1, dtype=torch.int64)
    for bad in (-1, 4, 2**40):
        with pytest.raises(InvalidRequest, match=r"labels must be in 0\.\.3"):
            classes(embeddings, torch.full_like(labels, bad))
    for bad in (-1, 16, 2**40):
        with pytest.raises(InvalidRequest):
            pairs(embeddings, labels, (one, one + bad, one, one))
    classes(embeddings, labels % 4).backward()
    pairs(embeddings, labels).backward()
    assert bool(embeddings.grad.isfinite().all())


@pytest.mark.parametrize("remote", [False, True])
def test_gradients_are_where_their_tensors_are(on_gpu: gradbank.Client, name: str, remote: bool) -> None:
    embeddings, labels = batch(32)
    for number, loss in enumerate((losses.ArcFaceLoss(8, 128), losses.ArcFaceLoss(8, 128).cuda())):
        loss_fn = on_gpu.open(f"{name}-{number}", loss) if remote else loss
        value = loss_fn(embeddings, labels)
        value.backward()
        assert value.device == embeddings.device == embeddings.grad.device
        assert remote or loss.W.grad.device == loss.W.device


@pytest.mark.parametrize("remote", [False, True])
def test_a_model_trains_under_autocast_with_a_scaler(on_gpu: gradbank.Client, name: str, remote: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 128).cuda()
    loss_fn = losses.CrossBatchMemory(losses.NTXentLoss(), 128, 512)
    loss_fn = on_gpu.open(name, loss_fn) if remote else loss_fn
    optimizer, scaler = torch.optim.Adam(model.parameters(), 1e-2), torch.amp.GradScaler("cuda")
    inputs, labels = torch.randn(64, 64).cuda(), (torch.arange(64) // 4).cuda()
    seen = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = loss_fn(model(inputs), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(float(loss.detach()))
    assert seen[-1] < seen[4] / 2


def test_a_step_against_a_large_bank_takes_little_memory() -> None:
    loss_fn = losses.CrossBatchMemory(losses.NTXentLoss(), 128, 262_144)  # its distances would be 256 MiB
    for seed in range(64):
        loss_fn.add_to_memory(*batch(4096, seed=seed))
    embeddings, labels = batch(256)
    loss_fn(embeddings, labels).backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss_fn(embeddings, labels).backward()
    assert torch.cuda.max_memory_allocated() - before < 128 * MIB
