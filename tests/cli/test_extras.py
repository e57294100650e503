"""Without the extra `server`, what needs it says so."""

import subprocess
import sys

import pytest


def without(package: str, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process that cannot import `package`."""
    blocked = f"import sys; sys.modules[{package!r}] = None\n{code}"
    return subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, timeout=60)


def test_the_command_line_names_the_extra() -> None:
    done = without("cyclopts", "from gradbank_server.__main__ import main; main()")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("cyclopts, which is not installed: pip install 'gradbank[server]'")


def test_a_picture_of_a_bench_names_the_extra() -> None:
    done = without("matplotlib", "from gradbank_server.cli import app; app(['bench', '--picture', 'b.png'])")
    assert done.returncode == 2
    assert done.stderr.strip() == "gradbank: a picture needs matplotlib: pip install 'gradbank[demo]'"


@pytest.mark.parametrize("package", ["pydantic", "prometheus_client", "structlog", "grpc_health"])
def test_the_embedded_server_names_the_extra(package: str) -> None:
    done = without(package, "import gradbank; gradbank.connect('local://')")
    assert "InvalidRequest" in done.stderr
    assert "pip install 'gradbank[server]'" in done.stderr


def test_the_library_needs_none_of_it() -> None:
    code = "import torch; from gradbank import losses; losses.NTXentLoss()(torch.randn(4, 2), torch.arange(4) // 2)"
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in ("pydantic", "cyclopts", "rich", "structlog"))
    done = without("prometheus_client", blocked + code)
    assert done.returncode == 0, done.stderr
