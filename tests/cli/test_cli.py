"""The command line: what it lists, what it says when it cannot, and how a server is set up."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.component import components
from gradbank_server import cli
from gradbank_server.printed import duration
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings, unknown_variables


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal on which no line breaks."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(cli.console, "_width", 400)
    for name in list(os.environ):
        if name.startswith("GRADBANK_"):
            monkeypatch.delenv(name)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs a command in this process: its exit code, what it printed, and what it complained of."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.app(words)
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def test_help_documents_every_command(run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in ("serve", "demo", "bench", "health", "sessions", "close", "catalog"):
        assert re.search(rf"│ {command} +[A-Z]\w+ ", out), command
        assert run(command, "--help")[0] == 0
    documented = re.findall(r"\w+(?= \||`)", cli.__doc__ or "")
    assert set(documented) <= set(re.findall(r"│ (\w+)", out)), "the module's own docstring names these"


def test_help_of_serve_documents_every_setting(run) -> None:
    _, out, _ = run("serve", "--help")
    assert "--max-sessions as GRADBANK_MAX_SESSIONS" in out
    for name, field in ServerSettings.model_fields.items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"│ --{name.replace('_', '-')} ")]
        assert field.description
        assert field.description in line
        assert field.default == "" or f"[default: {field.default}]" in line


def test_the_readme_of_settings_agrees(run) -> None:
    deploy = (Path(__file__).parents[2] / "docs/deploy.md").read_text()
    known = {f"--{name.replace('_', '-')}" for name in ServerSettings.model_fields}
    variables = {f"GRADBANK_{name.upper()}" for name in ServerSettings.model_fields}
    assert set(re.findall(r"GRADBANK_[A-Z][A-Z_]+", deploy)) <= variables
    serving = re.findall(r"gradbank serve(.*)", deploy)
    assert set(re.findall(r"--[a-z-]+", " ".join(serving))) <= known


def test_version_is_that_of_the_library(run) -> None:
    assert run("--version")[:2] == (0, f"{gradbank.__version__}\n")


def test_the_catalog_lists_every_component_with_its_arguments(run) -> None:
    code, out, _ = run("catalog")
    assert code == 0
    for name in components():
        assert re.search(rf"\b{name}\b", out)
    (line,) = [line for line in out.splitlines() if re.match(r" ?loss +NTXentLoss ", line)]
    assert "temperature=0.07" in line
    assert "embedding_reg_weight" not in line, "what every loss takes is said once"
    assert out.count("embedding_reg_weight=1.0") == 1
    kinds = [
        line.split()[0] for line in out.splitlines() if re.match(r" ?(loss|distance|miner|reducer|regularizer) ", line)
    ]
    assert kinds == sorted(kinds), "a table for each kind"


def test_the_catalog_documents_a_component(run) -> None:
    code, out, _ = run("catalog", "CrossBatchMemory")
    assert code == 0
    assert "memory_size=1024" in out
    assert out.startswith("loss CrossBatchMemory(loss, embedding_size, ")
    assert re.search(r"^Paper:\n    Wang et al., .Cross-Batch Memory for Embedding Learning., CVPR 2020\.$", out, re.M)
    assert out.count("Cross-Batch Memory for Embedding Learning") == 1
    assert re.search(r"^    memory_size +int$", out, re.M)
    assert re.search(r"\bembedding_size\b(?!=)", out), "an argument that must be given has no default"


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("NTXentLos", "NTXentLoss"), ("CrossBatchMemroy", "CrossBatchMemory"), ("ArcFace", "ArcFaceLoss")],
)
def test_a_misspelt_component_is_answered_with_the_closest(run, asked: str, meant: str) -> None:
    code, out, err = run("catalog", asked)
    assert (code, out) == (2, "")
    assert err.strip() == f"gradbank: no component is named {asked!r}; did you mean {meant!r}?"


def test_sessions_lists_what_is_open(run) -> None:
    with Server(ServerSettings(port=0, metrics_port=-1)) as server:
        assert run("sessions", "--address", server.address)[:2] == (0, f"no sessions at {server.address}\n")
        with gradbank.connect(server.address, timeout=10) as client:
            there = client.open("run-1", losses.CrossBatchMemory(losses.NTXentLoss(), 16, 64))
            client.open("arc", losses.ArcFaceLoss(4, 16), rank=3)
            loss = there(torch.randn(8, 16), torch.arange(8) % 3)
            code, out, _ = run("sessions", "--address", server.address)
    assert code == 0
    arc, memory = out.splitlines()[1:]
    assert re.match(rf" ?run-1 +CrossBatchMemory\(NTXentLoss\) +0 +1 +{loss.item():.4f} +8 of 64 +\d+\.\d\d", memory)
    assert re.match(r" ?arc +ArcFaceLoss +3 +0 +", arc)


def test_close_ends_a_session(run) -> None:
    with Server(ServerSettings(port=0, metrics_port=-1)) as server, gradbank.connect(server.address) as client:
        client.open("glyphs", losses.NTXentLoss())
        assert run("close", "glyph", "--address", server.address) == (
            *(2, ""),
            f"gradbank: no session at {server.address} is called 'glyph'; did you mean 'glyphs'?\n",
        )
        assert run("close", "glyphs", "--address", server.address) == (0, "closed glyphs\n", "")
        assert client.sessions() == []
        assert run("close", "glyphs", "--address", server.address)[0] == 2


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0 s"), (59, "59 s"), (90, "1.5 min"), (7200, "2.0 h"), (9e5, "10.4 d")]
)
def test_how_long_is_told_in_the_unit_that_fits(seconds: float, told: str) -> None:
    assert duration(seconds) == told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("demo", "--steps", "0"), "--steps must be at least 1, got 0"),
        (("demo", "--picture", "demo.txt"), "--picture must end in .*demo.txt"),
        (("demo", "--picture", "no/such/demo.png"), "there is no folder 'no/such'"),
        (("health", "--timeout", "-1"), "--timeout must be above 0 seconds, got -1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(run, words: tuple[str, ...], message: str) -> None:
    code, _, err = run(*words)
    assert code == 2
    assert re.search(message, err)
    assert err.count("\n") == 1


def test_a_server_that_is_not_there_is_an_error_of_one_line(run) -> None:
    code, out, err = run("sessions", "--address", "127.0.0.1:1", "--timeout", "2")
    assert (code, out) == (2, "")
    assert err.startswith("gradbank: the server cannot be reached")
    code, out, err = run("sessions", "--address", "nowhere")
    assert (code, err) == (2, "gradbank: an address is host:port, unix:///path or local://, got 'nowhere'\n")


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "--port", "99999"],
        ["serve", "--port", "http"],
        ["serve", "--max-sessions", "0"],
        ["serve", "--log-level", "loud"],
        ["serve", "--prot", "1"],
        ["nonsense"],
        ["health", "--timeout", "soon"],
    ],
    ids=" ".join,
)
def test_a_bad_flag_is_refused_by_name(run, words: list[str]) -> None:
    code, out, err = run(*words)
    assert code == 2
    assert words[-2 if len(words) > 1 else 0].removeprefix("--").replace("-", "_") in (out + err).replace("-", "_")


@pytest.mark.parametrize(("variable", "value"), [("GRADBANK_PORT", "http"), ("GRADBANK_MAX_SESSIONS", "0")])
def test_a_bad_variable_is_refused_by_name(run, monkeypatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    code, out, err = run("serve")
    assert code == 2
    assert variable.removeprefix("GRADBANK_").lower() in (out + err).lower()


def test_a_variable_sets_what_no_flag_does() -> None:
    variables = {"GRADBANK_MAX_SESSIONS": "7", "GRADBANK_MAX_STEP_BYTES": str(2**20), "GRADBANK_METRICS_PORT": "-1"}
    command = [sys.executable, "-m", "gradbank_server", "serve", "--port", "0", "--max-sessions", "9"]
    environment = os.environ | variables
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        said = _until_client(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert "9 sessions" in said, "the flag wins"
    assert "1 MiB a step" in said
    assert re.search(r"metrics +off", said)


def test_a_variable_that_is_no_setting_is_named() -> None:
    told = unknown_variables({"GRADBANK_MAX_SESION": "7", "GRADBANK_MAX_SESSIONS": "7", "GRADBANK_X": "", "PATH": "/"})
    assert told == {"GRADBANK_MAX_SESION": "GRADBANK_MAX_SESSIONS", "GRADBANK_X": None}
    command = [sys.executable, "-m", "gradbank_server", "serve", "--port", "0", "--metrics-port", "-1"]
    environment = os.environ | {"GRADBANK_MAX_SESION": "7"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        said = _until_client(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert "no setting has this name" in said
    assert '"did_you_mean": "GRADBANK_MAX_SESSIONS"' in said


def _until_client(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "client" in line:
            break
    return said
