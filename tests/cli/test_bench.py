"""`gradbank bench`: where the time of a step goes, and what it leaves behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gradbank
from gradbank.errors import LimitExceeded
from gradbank_server.bench import PHASES, Course, Workload, bench
from gradbank_server.cli import app
from gradbank_server.service import Server
from gradbank_server.settings import ServerSettings

SMALLEST = ("--batch", "16", "--dimension", "8", "--bank", "64", "--steps", "5")
SMALL = Workload(rows=16, dimension=8, bank=64, steps=12)


@pytest.mark.parametrize("workload", [SMALL, Workload(16, 8, 0, 12)], ids=["bank", "batch"])
def test_the_phases_are_those_of_a_step(server: Server, client: gradbank.Client, workload: Workload) -> None:
    before = {session.name for session in client.sessions()}
    course, name = bench(server.address, 20, workload)
    assert list(course.phases) == list(PHASES)
    assert [len(times) for times in course.phases.values()] == [12] * len(PHASES)
    for i, step in enumerate(course.steps):
        assert 0 < sum(times[i] for times in course.phases.values()) <= step
    assert course.empty
    assert course.here
    assert name.endswith("on cpu, via tcp")
    assert {session.name for session in client.sessions()} == before, "its session is left behind"


def test_a_workload_that_the_server_refuses_leaves_no_session() -> None:
    with Server(ServerSettings(port=0, metrics_port=-1, max_session_bytes=1000)) as small:
        with pytest.raises(
            LimitExceeded,
            match="does not fit the server, of which a session may take 1,000 bytes",
        ):
            bench(small.address, 20, SMALL)
        with gradbank.connect(small.address) as client:
            assert client.sessions() == []


def test_the_bank_is_full_from_the_first_step() -> None:
    assert len(SMALL.loss()) == 64


@pytest.mark.parametrize(
    ("most", "said"),
    [
        ("network", "The way there and back takes 91 % of a step"),
        ("queue", "91 % of a step is waiting for other trainers"),
        ("compute", "The loss itself takes 91 % of a step, 9 ms there and 3 ms here: it is faster here."),
        ("client_encode", "Tensors to bytes (here) takes 91 % of a step"),
    ],
)
def test_the_advice_is_about_what_takes_most(most: str, said: str) -> None:
    phases = {phase: [0.009 if phase == most else 0.0001] * 3 for phase in PHASES}
    assert said in Course(phases, [0.0099] * 3, [0.0005], [0.003]).advice()


@pytest.mark.parametrize("words", [("--batch", "4"), ("--bank", "100"), ("--steps", "0"), ("--dimension", "0")])
def test_a_workload_that_makes_no_sense_is_an_error_of_one_line(
    words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["bench", *words])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_table_shows_every_phase_and_an_advice(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["bench", "--address", server.address, *SMALLEST])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "16 x 8 float32" in out
    assert all(phase in out for phase in (*PHASES, "empty call", "local"))
    assert "% of a step" in out


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_shows_every_phase(server: Server, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"bench{suffix}"
    with pytest.raises(SystemExit) as ended:
        app(["bench", "--address", server.address, *SMALLEST, "--picture", str(file)])
    assert ended.value.code == 0
    if suffix == ".png":
        assert file.read_bytes().startswith(b"\x89PNG")
    else:
        drawn = file.read_text()  # in which matplotlib notes each text that it draws
        assert all(f"<!-- {phase}: " in drawn for phase in PHASES)


@pytest.mark.parametrize(
    ("picture", "said"),
    [("bench.gif", "must end in .png, .svg, .pdf, got 'bench.gif'"), ("nowhere/b.png", "there is no folder 'nowhere'")],
)
def test_a_picture_that_cannot_be_saved_is_refused_before_anything_is_measured(
    picture: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        app(["bench", "--address", "127.0.0.1:1", "--picture", picture])  # where nobody listens
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_info is glibc's")
def test_all_threads_of_a_server_share_an_arena(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("arenas") / "info.xml"
    program = f"""
import ctypes, threading
from gradbank_server.allocator import use_one_arena
assert use_one_arena()
import torch
held = []
threads = [threading.Thread(target=lambda: held.append(torch.ones(30_000))) for _ in range(6)]
for each in threads: each.start()
for each in threads: each.join()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(libc.fopen({str(place)!r}.encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert place.read_text().count("<heap nr=") == 1


def test_a_bench_that_is_told_to_end_leaves_no_session(server: Server, client: gradbank.Client) -> None:
    command = [sys.executable, "-m", "gradbank_server", "bench", "--address", server.address, "--steps", "1000000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        end = time.monotonic() + 60
        while not any(session.name.startswith("bench-") and session.steps for session in client.sessions()):
            assert time.monotonic() < end
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 128 + signal.SIGTERM
    assert not any(session.name.startswith("bench-") for session in client.sessions())
