"""The command line where something around it is amiss: proxies, full disks, sessions that end, odd packages."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.errors import LimitExceeded, SessionNotFound
from gradbank_server import cli
from gradbank_server.service import Server

GRADBANK = [sys.executable, "-m", "gradbank_server"]


def test_a_server_on_this_machine_is_asked_without_a_proxy(server: Server) -> None:
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://127.0.0.1:9")
    command = [*GRADBANK, "health", "--address", server.address]
    done = subprocess.run(command, env=os.environ | nowhere, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{server.address}: SERVING\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_the_answer_of_health_is_its_exit_code_whether_or_not_it_can_be_written(server: Server) -> None:
    for where, address in ((">/dev/full", server.address), (">&-", server.address), (">/dev/full", "127.0.0.1:1")):
        command = f"exec {sys.executable} -m gradbank_server health --timeout 1 --address {address} {where}"
        done = subprocess.run(["/bin/sh", "-c", command], stderr=subprocess.PIPE, text=True, timeout=60)
        assert done.returncode == (0 if address == server.address else 1)
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_output_that_has_nowhere_to_go_is_an_error_of_one_line() -> None:
    command = f"{' '.join(GRADBANK)} catalog >/dev/full"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "gradbank: No space left on device\n")


@pytest.fixture
def serving() -> Iterator[subprocess.Popen[str]]:
    # which may be ignored here, as under `nohup`
    begin = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); from gradbank_server.__main__ import main; main()"
    )
    command = [sys.executable, "-c", begin, "serve", "--port", "0", "--metrics-port", "-1", "--drain-seconds", "inf"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        yield process
        process.kill()


def address_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return next(line.split()[1] for line in process.stdout if "listening" in line)


def test_a_hangup_ends_a_server_in_order(serving: subprocess.Popen[str]) -> None:
    address_of(serving)
    serving.send_signal(signal.SIGHUP)
    assert serving.stderr is not None
    assert serving.wait(30) == 0
    said = serving.stderr.read()
    assert '"event": "stopped"' in said
    assert "Infinity" not in said, "which is no JSON"


@pytest.mark.parametrize("number", ["INT", "TERM"])
def test_a_server_that_a_shell_starts_in_the_background_can_be_ended(tmp_path: Path, number: str) -> None:
    """A shell without a terminal has its background jobs ignore interrupts."""
    script = f"""
        trap '' {number}
        {" ".join(GRADBANK)} serve --port 0 --metrics-port -1 >{tmp_path}/out 2>&1 &
        until grep -q listening {tmp_path}/out; do sleep 0.1; done
        kill -{number} $!
        wait $!
    """
    assert subprocess.run(["/bin/sh", "-c", script], timeout=60).returncode == 0


def test_a_server_serves_though_nobody_reads_what_it_says(tmp_path: Path) -> None:
    place = tmp_path / "socket"
    serve = f"{' '.join(GRADBANK)} serve --port 0 --metrics-port -1 --unix-socket {place}"
    script = f"({serve} & echo $! >{tmp_path}/pid; wait $!) 2>{tmp_path}/err | true"
    with subprocess.Popen(["/bin/sh", "-c", script]):
        asked = [*GRADBANK, "health", "--address", f"unix://{place}", "--timeout", "60"]
        assert subprocess.run(asked, capture_output=True, timeout=90).returncode == 0
        time.sleep(0.5)  # by then it has tried to say where it listens
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)  # it is there
    assert '"event": "stopped"' in (tmp_path / "err").read_text()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs limits of Linux")
def test_what_has_no_room_in_memory_is_refused_as_too_large(serving: subprocess.Popen[str]) -> None:
    import resource

    address = address_of(serving)
    status = Path(f"/proc/{serving.pid}/status").read_text()
    held = int(status.partition("VmSize:")[2].split()[0]) * 1024
    resource.prlimit(serving.pid, resource.RLIMIT_AS, (held + 300 * 2**20,) * 2)
    with gradbank.connect(address) as client:
        for classes in (2_000_000, 500_000):
            with pytest.raises(LimitExceeded, match="no memory"):
                client.open("classes", losses.ArcFaceLoss(num_classes=classes, embedding_size=64))
        there, embeddings = client.open("run", losses.NTXentLoss()), torch.randn(1_000_000, 64)
        with pytest.raises(LimitExceeded):
            there(embeddings, torch.arange(len(embeddings)))
        assert torch.isfinite(there(embeddings[:64], torch.arange(64) // 2))


def test_a_session_that_ends_while_sessions_are_listed_is_left_out(
    server: Server, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = gradbank.Client.stats

    def stats(self: gradbank.Client, session: str) -> object:
        if session == f"{name}-gone":
            raise SessionNotFound(session)
        return plain(self, session)

    with gradbank.connect(server.address) as client:
        for each in ("gone", "here"):
            client.open(f"{name}-{each}", losses.NTXentLoss())
        monkeypatch.setattr(gradbank.Client, "stats", stats)
        with pytest.raises(SystemExit) as ended:
            cli.app(["sessions", "--address", server.address])
        assert ended.value.code == 0
        listed = capsys.readouterr().out
        assert f"{name}-here" in listed
        assert f"{name}-gone" not in listed
        for each in ("gone", "here"):
            client.close_session(f"{name}-{each}")


def test_a_table_of_sessions_has_their_names_whole_wherever_it_is_printed(server: Server, name: str) -> None:
    long, ranks = f"{name}-{'x' * 40}", [0, 1, 2, 7]
    with gradbank.connect(server.address) as client:
        for rank in ranks:
            client.open(long, losses.CrossBatchMemory(losses.GeneralizedLiftedStructureLoss(), 16, 10**6), rank=rank)
        command = [*GRADBANK, "sessions", "--address", server.address]
        ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ascii_only)
        client.close_session(long)
    assert done.returncode == 0, done.stderr
    (line,) = (each for each in done.stdout.splitlines() if long in each)
    assert "CrossBatchMemory(GeneralizedLiftedStructureLoss)" in line
    assert "0-2,7" in line


def test_an_address_is_printed_as_it_is_written() -> None:
    command = [*GRADBANK, "health", "--address", "unix:///tmp/[/b]s.sock", "--timeout", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "unix:///tmp/[/b]s.sock: " in done.stdout


def test_a_package_that_ends_python_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "exits.py").write_text("import sys\n\nsys.exit(3)\n")
    command = [*GRADBANK, "serve", "--port", "0", "--components", "exits"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "gradbank: --components (GRADBANK_COMPONENTS) names 'exits', and importing it failed: Sy"
    )


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        (["--port", "abc"], {}, "--port (GRADBANK_PORT): Input should be a valid integer"),
        (
            ["--port", "0"],
            {"GRADBANK_LOG_FORMAT": "JSON"},
            "--log-format (GRADBANK_LOG_FORMAT): Input should be 'auto'",
        ),
        ([], {"GRADBANK_MAX_SESSIONS": "0"}, "--max-sessions (GRADBANK_MAX_SESSIONS): Input should be greater than"),
    ],
)
def test_a_bad_setting_is_named_as_a_flag_and_as_a_variable(
    words: list[str], variables: dict[str, str], message: str
) -> None:
    environment = os.environ | {"COLUMNS": "300"} | variables
    done = subprocess.run([*GRADBANK, "serve", *words], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).startswith(f"gradbank: {message}")
    assert "pydantic" not in done.stdout + done.stderr
