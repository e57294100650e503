"""The benchmark of the wire runs, and what it measures is what was sent."""

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "transport"


def test_a_line_for_each_payload_with_a_ratio_for_each_way() -> None:
    words = [sys.executable, str(BENCHMARK), "--payloads", "8x4,600x512", "--seconds", "1"]
    made = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    lines = [line for line in made.stdout.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:]] == ["| 8x4", "| 600x512"]
    assert [line.count("x") - line.split(" | ")[0].count("x") for line in lines[1:]] == [4, 4]  # ratios
    assert "1,200 KiB" in lines[2]  # a step of more than one message
