"""What of pytorch-metric-learning cannot be converted is refused, with where it lies and what to do."""

import subprocess
import sys
from typing import Any

import pytest
from pytorch_metric_learning import distances, losses, samplers
from pytorch_metric_learning.utils import distributed
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from torch import nn

import gradbank


class Mine(losses.ContrastiveLoss):
    """Computes something else."""


class Farther(distances.LpDistance):
    """Measures something else."""


def twisted(name: str) -> distances.LpDistance:
    distance = distances.LpDistance()
    setattr(distance, name, lambda *inputs: inputs[0] @ inputs[1].T)
    return distance


def hooked() -> losses.ContrastiveLoss:
    loss = losses.ContrastiveLoss()
    loss.register_forward_hook(lambda *_: None)
    return loss


def inverted() -> distances.LpDistance:
    distance = distances.LpDistance()
    distance.is_inverted = True
    return distance


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (Mine(), r"^Mine is a .*Mine, a subclass of PML's ContrastiveLoss: .*write it as a gradbank component"),
        (
            losses.NTXentLoss(distance=Farther()),
            r"^NTXentLoss\.distance is a .*Farther, a subclass of PML's LpDistance",
        ),
        (nn.Linear(2, 2), r"^Linear is a torch.nn.modules.linear.Linear, no class of pytorch_metric_learning"),
        ("NTXentLoss", r"^str is a builtins.str, no class of pytorch_metric_learning"),
        (
            distributed.DistributedLossWrapper(losses.NTXentLoss()),
            r"^DistributedLossWrapper is PML's .*, which gradbank has none of: convert the loss within it",
        ),
        (losses.GenericPairLoss(mat_based_loss=True), r"GenericPairLoss, .* derive your loss from gradbank\.losses\.G"),
        (losses.BaseMetricLossFunction(), "PML's BaseMetricLossFunction, which gradbank does not have"),
        (
            losses.ContrastiveLoss(distance=twisted("compute_mat")),
            r"^ContrastiveLoss\.distance\.compute_mat was replaced",
        ),
        (twisted("forward"), r"^LpDistance\.forward was replaced by a function of your own"),
        (hooked(), r"^ContrastiveLoss has hooks"),
        (inverted(), r"^LpDistance\.is_inverted is True, and in gradbank's LpDistance it is False"),
        (
            losses.CrossBatchMemory(losses.NTXentLoss(), 4, miner=nn.Identity()),
            r"^CrossBatchMemory\.miner is a .*Identity",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_converted_is_refused_by_name(obj: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        gradbank.from_pml(obj)


def test_a_class_of_pml_that_was_changed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances.LpDistance, "compute_mat", lambda self, a, b: a @ b.T)
    with pytest.raises(TypeError, match=r"^ContrastiveLoss\.distance\.compute_mat was replaced"):
        gradbank.from_pml(losses.ContrastiveLoss())


def test_an_argument_that_is_refused_is_named() -> None:
    loss = losses.ArcFaceLoss(3, 4)
    loss.num_classes = 0
    with pytest.raises(ValueError, match=r"^ArcFaceLoss cannot be converted: num_classes must be a whole .* got 0"):
        gradbank.from_pml(loss)


def test_gradbank_does_without_pml() -> None:
    code = """
import sys
sys.modules["pytorch_metric_learning"] = None
import gradbank, torch
try:
    gradbank.from_pml(torch.nn.Identity())
except TypeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "no class of pytorch_metric_learning" in done.stdout


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (losses.NTXentLoss, r"from_pml converts objects, got the class NTXentLoss"),
        (AccuracyCalculator(), r"build gradbank\.evaluation\.AccuracyCalculator with the same arguments"),
        (samplers.MPerClassSampler([0, 1] * 4, 2), r"build gradbank\.samplers\.MPerClassSampler"),
    ],
)
def test_what_holds_nothing_to_convert_is_told_so(given: Any, told: str) -> None:
    with pytest.raises(TypeError, match=told):
        gradbank.from_pml(given)
