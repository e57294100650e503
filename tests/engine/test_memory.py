"""A step's extra memory: bounded, however large the bank."""

import subprocess
import sys

import pytest

MIB = 2**20

# run by itself, since a process's peak knows no tests: the bank is there before the peak is reset
STEP = """
import sys, torch
from gradbank import losses
from pathlib import Path

def mib(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024

torch.set_num_threads(1)
torch.manual_seed(0)
bank = losses.CrossBatchMemory({loss}, {dimension}, {size})
while not bank.has_been_filled:
    bank.add_to_memory(torch.randn(1024, {dimension}), torch.randint({classes}, (1024,)))
embeddings, labels = torch.randn({batch}, {dimension}, requires_grad=True), torch.randint({classes}, ({batch},))
bank.embedding_memory
losses.CrossBatchMemory({loss}, {dimension}, 2 * {batch})(embeddings, labels).backward()  # torch loads what it needs
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = mib("VmRSS")
loss = bank(embeddings, labels)
loss.backward()
assert embeddings.grad.any() and loss.isfinite()
print(mib("VmHWM") - before)
"""


def extra_mib(loss: str, **sizes: int) -> float:
    sizes = {"batch": 256, "dimension": 128, "size": 65536, "classes": 1000} | sizes
    script = STEP.format(loss=loss, **sizes)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        "losses.NTXentLoss()",
        "losses.ContrastiveLoss()",
        "losses.TripletMarginLoss()",
    ],
)
def test_step_against_a_large_bank_takes_little_more(loss: str) -> None:
    """All pairs of 256 anchors and 65536 references are 64 MiB a matrix; all triplets are 250 million."""
    assert extra_mib(loss) < 300


@pytest.mark.slow
def test_few_classes_take_no_more() -> None:
    """Of 4 classes every fourth reference is a positive: four million of them, and 10^11 triplets."""
    assert extra_mib("losses.TripletMarginLoss()", classes=4, size=32768, batch=64) < 300
    assert extra_mib("losses.NTXentLoss()", classes=4, size=32768) < 300
