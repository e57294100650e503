"""What a type checker makes of programs as users write them."""

from pathlib import Path

from mypy import api

PROGRAM = """
import torch

import gradbank
from gradbank import aio, losses

members = [losses.NTXentLoss(), losses.TripletMarginLoss()]
weights, named = [1, 1], {"a": losses.NTXentLoss()}
losses.MultipleLosses(members, weights=weights)
losses.MultipleLosses((losses.NTXentLoss(), losses.NTXentLoss()))
losses.MultipleLosses(named)


def of_any(loss_fn: gradbank.RemoteLoss) -> torch.Tensor:
    return loss_fn(torch.randn(8, 16), torch.arange(8))


with gradbank.connect("local://") as client:
    head = client.open("h", losses.ArcFaceLoss(num_classes=10, embedding_size=16))
    logits: torch.Tensor = head.local().get_logits(torch.randn(8, 16))
    size: int = head.hosted.num_classes
    of_any(head)


async def awaited() -> torch.Tensor:
    async with await aio.connect("local://") as there:
        loss_fn = await there.open("h", losses.ArcFaceLoss(10, 16))
        return (await loss_fn.local()).W
"""


def test_programs_of_users_pass_a_strict_checker(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    told, faults, code = api.run(["--strict", "--cache-dir", str(tmp_path / "cache"), str(path)])
    assert not code, told + faults
