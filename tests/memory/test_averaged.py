"""A queue in a module of which averages are taken, as by torch's and Lightning's callbacks of weights."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from gradbank import losses


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_module_with_a_queue_can_be_averaged(use_buffers: bool) -> None:
    torch.manual_seed(0)
    memory: Any = losses.CrossBatchMemory(losses.ContrastiveLoss(), 4, memory_size=64)
    model = nn.ModuleDict({"net": nn.Linear(8, 4), "loss": memory})
    averaged = AveragedModel(model, use_buffers=use_buffers)
    weights = []
    for _ in range(3):
        memory(model["net"](torch.randn(16, 8)), torch.arange(16) // 4).backward()
        with torch.no_grad():
            model["net"].weight.add_(1)
        weights.append(model["net"].weight.detach().clone())
        averaged.update_parameters(model)
    torch.testing.assert_close(averaged.module["net"].weight.detach(), torch.stack(weights).mean(0))
    assert len(memory.bank) == 48
    assert len(averaged.module["loss"].bank) == 0, "of a queue there is no average"
