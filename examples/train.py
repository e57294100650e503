"""A training loop through a gradbank server, in full, on data that it makes up.

python examples/train.py                   # a server inside this process
python examples/train.py gpu-box:50051     # a server started with `gradbank serve`
"""

import sys

import torch
from torch import nn

import gradbank
from gradbank import losses

CLASSES, SIDE, STEPS = 50, 16, 300


def batches(seed: int = 0):
    """Noisy copies of 50 random patterns: 32 classes a batch, two images each."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(CLASSES, SIDE * SIDE, generator=generator)
    while True:
        labels = torch.randperm(CLASSES, generator=generator)[:32].repeat(2)
        yield patterns[labels] + 1.5 * torch.randn(64, SIDE * SIDE, generator=generator), labels


def main(address: str = "local://") -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIDE * SIDE, 128), nn.ReLU(), nn.Linear(128, 32))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss_fn = losses.CrossBatchMemory(losses.NTXentLoss(temperature=0.1), embedding_size=32, memory_size=2048)
    with gradbank.connect(address) as client:
        loss_fn = client.open("train-example", loss_fn)
        for step, (images, labels) in zip(range(STEPS), batches()):
            loss = loss_fn(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                print(f"step {step:3d}  loss {loss.item():.3f}")
        stats = client.stats("train-example")
        print(
            f"the bank holds {stats.bank_rows} rows after {stats.steps} steps; the mean loss is {stats.mean_loss:.3f}"
        )
        client.close_session("train-example")
    return loss.item()


if __name__ == "__main__":
    main(*sys.argv[1:2])
