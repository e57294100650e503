"""The benchmark program measures every loss and miner there is, and prints what docs/benchmarks.md shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gradbank import losses, miners
from gradbank.component import components
from gradbank.losses.loss import Loss
from gradbank.losses.pair import PairLoss

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^### (.+)\n\n(.+)\n\|[-|]+\n((?:\|.*\n)+)", re.MULTILINE)


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "losses.py"), "--threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)


def tables(text: str) -> list[dict[str, list[str]]]:
    """For each section the cells of each row, by the row's case."""
    found = []
    for _, _, rows in SECTION.findall(text):
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]
        found.append({each[0]: each for each in cells})
    return found


def losses_by_name() -> dict[str, type[Loss]]:
    """What is exported, registered and no wrapper around another loss."""
    registered = {name: kind for name, kind in components().items() if getattr(losses, name, None) is kind}
    wraps = {"loss", "losses"}
    return {name: kind for name, kind in registered.items() if not wraps & set(kind.__dataclass_fields__)}


@pytest.fixture(scope="module")
def listed() -> str:
    return benchmark("--list").stdout


def test_every_loss_is_measured_in_a_batch(listed: str) -> None:
    assert set(tables(listed)[1]) == set(losses_by_name())


def test_every_loss_that_a_bank_supports_is_measured_in_a_large_one(listed: str) -> None:
    supported = {
        name
        for name, kind in losses_by_name().items()
        if issubclass(kind, PairLoss)
        and kind.takes_references
        and not kind.learns_references
        and kind.stage is Loss.stage
    }
    assert {case.split(",")[0] for case in tables(listed)[4]} == supported


def test_every_miner_is_measured(listed: str) -> None:
    assert set(tables(listed)[3]) == {name for name in components() if name in miners.__all__} - {
        "EmbeddingsAlreadyPackagedAsTriplets"  # which has nothing to choose
    }


def test_the_documentation_shows_each_case_with_its_target(listed: str) -> None:
    documented = tables((ROOT / "docs" / "benchmarks.md").read_text())
    for shown, known in zip(documented, tables(listed), strict=True):
        assert shown.keys() == known.keys()
        for case, cells in known.items():
            assert (shown[case][2], shown[case][4]) == (cells[2], cells[4]), case


def test_a_row_tells_time_and_memory_beside_their_targets() -> None:
    done = benchmark("--small", "--seconds", "0.01", "--only", "NTXent|^Histogram|^ArcFace|HDC")
    bank, batch, classes, mined, large, some, few = tables(done.stdout)
    assert re.fullmatch(r"[\d.]+x floor", bank["NTXentLoss"][1]), done.stderr
    assert bank["NTXentLoss"][2::2] == ["<= 2x", "<= 100 MiB"]
    assert re.fullmatch(r"\d+ MiB", bank["NTXentLoss"][3])
    assert re.fullmatch(r"[\d.]+ m?s", batch["HistogramLoss"][1])
    assert re.fullmatch(r"[\d.]+x floor", classes["ArcFaceLoss"][1])
    assert mined["HDCMiner"][1:] == [mined["HDCMiner"][1], "<= 1 s", mined["HDCMiner"][3], "<= 300 MiB", "ok"]
    assert re.fullmatch(r"[\d.]+x per row", large["NTXentLoss"][1])
    assert all(re.fullmatch(r"[\d.]+ ms", each["NTXentLoss"][1]) for each in (some, few))


def test_a_missed_target_fails_the_check() -> None:
    assert benchmark("--check", "--small", "--seconds", "0.01", "--only", "^BatchHardMiner").returncode == 0
    starved = benchmark("--check", "--section", "bank", "--only", "^SupCon", "--gib", "0.02")
    assert starved.returncode == 1
    assert tables(starved.stdout)[0]["SupConLoss"][5] == "missed"
