"""The benchmark of the wire runs, and what it measures is what was sent."""

import re
import subprocess
import sys
from pathlib import Path

BESIDE = Path(__file__).parents[2] / "benchmarks" / "transport" / "beside.py"
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "transport"


def printed(*words: str) -> str:
    """What a program prints."""
    made = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, check=False)
    assert made.returncode == 0, made.stderr
    return made.stdout


def test_a_line_for_each_payload_with_a_ratio_and_a_rate_for_each_way() -> None:
    made = printed(str(BENCHMARK), "--payloads", "8x4,600x512", "--seconds", "1")
    lines = [line for line in made.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == 2 * ["| batch", "| 8x4", "| 600x512"]
    trips, rates = lines[1:3], lines[4:]
    assert [line.count("x") - line.split(" | ")[0].count("x") for line in trips] == [4, 4]  # ratios
    assert "1,200 KiB" in trips[1]  # a step of more than one message
    assert [len(re.findall(r"\d, \d", line)) for line in rates] == [3, 3]  # one at a time, and several in flight


def test_a_small_step_is_measured_alone_and_beside_a_large_one_here_and_elsewhere() -> None:
    tcp, shm = printed(str(BESIDE), "--batch", "64", "--bank", "1024", "--slices", "1").splitlines()[2:]
    for line, via in ((tcp, "tcp"), (shm, "shm")):
        assert line.startswith(f"| {via} | ")
        assert len(re.findall(r"\d ms", line)) == 8
