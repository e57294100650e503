"""A server hosts components of a user's own package, if it was started with its name."""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any

import pytest
import torch

import gradbank
from gradbank import losses
from gradbank.component import component, components
from gradbank.errors import InternalError, InvalidComponent, InvalidRequest, LimitExceeded
from gradbank.spec import Spec
from gradbank_server import cli
from gradbank_server.build import build_loss, import_components
from gradbank_server.service import Server
from gradbank_server.sessions import Limits, Sessions
from gradbank_server.settings import ServerSettings
from gradbank_server.storage import MemoryStorage

LOSS = '''
import torch
from gradbank import component, losses

@component
class PullLoss(losses.Loss):
    """Pulls samples of one class together, down to a floor.

        loss = mean over pairs (a, p) of relu(|x_a - x_p| - floor)

    Doe et al., "Pulling Without Pushing", JOURNAL 2024.
    """
    floor: float = 0.1

    def forward(self, embeddings, labels):
        same = labels[:, None] == labels
        return (torch.cdist(embeddings, embeddings)[same] - self.floor).relu().mean()
'''

LOST = '''
import random
import torch
from gradbank import component, losses

@component
class LostLoss(losses.Loss):
    """Raises what torch does once a GPU has failed an assertion."""

    def forward(self, embeddings, labels):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

@component
class ClumsyLoss(losses.Loss):
    """Fails by itself, or in what it calls."""

    def forward(self, embeddings, labels):
        if labels[0] == 0:
            return embeddings.sum() + {}["oops"]
        if labels[0] == 1:
            return embeddings.sum() * random.choice([])
        if labels[0] == 2:
            one, = labels
        return torch.nn.functional.cross_entropy(embeddings, labels + 99)
'''

DISTANCE = '''
from dataclasses import field
import torch
from gradbank import component, distances

@component
class ScaledDistance(distances.Distance):
    """A distance whose axes weigh differently."""
    scales: torch.Tensor = field(kw_only=True)

    def compute_mat(self, query_emb, ref_emb):
        scales = self.scales.to(query_emb)
        return torch.cdist(query_emb * scales, ref_emb * scales)
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a package `my_losses`; this process forgets afterwards that it was there."""
    (tmp_path / "my_losses").mkdir()
    (tmp_path / "my_losses" / "__init__.py").write_text("from my_losses import distances, lost, pull\n")
    (tmp_path / "my_losses" / "lost.py").write_text(LOST)
    (tmp_path / "my_losses" / "pull.py").write_text(LOSS)
    (tmp_path / "my_losses" / "distances.py").write_text(DISTANCE)
    monkeypatch.setattr(importlib.import_module("gradbank.component"), "_REGISTRY", components())
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@contextmanager
def serving(
    folder: Path, *flags: str, stderr: int = subprocess.DEVNULL, **variables: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server in a process of its own, started in `folder`, and the process."""
    command = [sys.executable, "-P", "-m", "gradbank_server", "serve", "--port", "0", "--metrics-port", "-1", *flags]
    ours = [name for name in os.environ if name.startswith("GRADBANK_") and name != "GRADBANK_DEVICE"]
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    clean["OMP_NUM_THREADS"] = "1"  # as in this process: sums depend on how many there are
    with subprocess.Popen(
        command, cwd=folder, env=clean | variables, stdout=subprocess.PIPE, stderr=stderr, text=True
    ) as process:
        assert process.stdout is not None
        try:
            found = (re.search(r'connect\("(.+?)"\)', line) for line in process.stdout)
            yield next(each[1] for each in found if each), process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def assert_equal_to_local(remote: Any, local: Any) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        embeddings, labels = torch.randn(10, 4), torch.arange(10) % 3
        there, here = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
        of_server, of_library = remote(there, labels), local(here, labels)
        of_server.backward()
        of_library.backward()
        assert torch.equal(of_server, of_library)
        assert here.grad is not None
        assert there.grad is not None
        assert torch.equal(there.grad, here.grad)
        assert here.grad.any()


def own_losses() -> list[losses.Loss]:
    """One of the package, and one of gradbank around the package's distance."""
    mine = importlib.import_module("my_losses")
    distance = mine.distances.ScaledDistance(scales=torch.tensor([1.0, 2.0, 0.5, 3.0]))
    memory = losses.CrossBatchMemory(losses.ContrastiveLoss(distance=distance), 4, 30)
    return [mine.pull.PullLoss(floor=0.25), memory]


@pytest.mark.parametrize("told", ["by a flag", "by a variable"])
def test_a_server_process_hosts_the_package_that_it_was_told(package: Path, told: str) -> None:
    flags, variables = (["--components", "my_losses"], {}) if told == "by a flag" else ([], {"COMPONENTS": "my_losses"})
    with (
        serving(package, *flags, **{f"GRADBANK_{name}": value for name, value in variables.items()}) as (address, _),
        gradbank.connect(address, timeout=20) as client,
    ):
        for i, loss in enumerate(own_losses()):
            assert_equal_to_local(client.open(f"run-{i}", loss), loss.rebuilt())
        (info,) = [info for info in client.catalog() if info.name == "PullLoss"]
        assert (info.kind, info.paper) == ("loss", 'Doe et al., "Pulling Without Pushing", JOURNAL 2024.')
        assert ("floor", "float", "0.1") in info.arguments


def test_a_server_that_lost_its_gpu_ends_and_says_so(package: Path) -> None:
    """Nothing in its process could use the GPU again, and a supervisor starts another."""
    lost = importlib.import_module("my_losses").lost.LostLoss()
    with (
        serving(package, "--components", "my_losses", stderr=subprocess.PIPE) as (address, process),
        gradbank.connect(address, timeout=20) as client,
    ):
        with pytest.raises(
            InternalError, match=r"my_losses.lost, line \d+, in LostLoss.forward, raised AcceleratorError"
        ):
            client.open("run", lost)(torch.randn(4, 4), torch.arange(4))
        assert process.wait(20) == 70
        assert process.stderr is not None
        assert "cpu failed, and this process cannot use it any more: start the server again" in process.stderr.read()


def test_who_wrote_it_is_told_where_it_fails(package: Path) -> None:
    import_components(["my_losses"])
    clumsy = importlib.import_module("my_losses").lost.ClumsyLoss()
    settings = ServerSettings(port=0, metrics_port=0, components=["my_losses"])
    with Server(settings) as server, gradbank.connect(server.address, timeout=20) as client:
        loss_fn = client.open("run", clumsy)
        of_its_own = (
            "KeyError: 'oops'",
            "IndexError: Cannot choose from an empty sequence",
            "",
            "IndexError: Target 102 is",
        )
        for label, what in enumerate(of_its_own):
            line = r"my_losses.lost, line \d+, in ClumsyLoss.forward"
            kind, told = InternalError, rf"{line}, raised {what}.*; the server's log has .* under \w+"
            if not what:
                kind, told = InvalidRequest, rf"too many values to unpack \(expected 1\) \({line}\)"
            with pytest.raises(kind, match=told):
                loss_fn(torch.randn(4, 4), torch.full((4,), label))
        with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=5) as response:
            assert 'gradbank_steps_total{loss="ClumsyLoss",outcome="failed"} 3.0' in response.read().decode()


def test_so_does_the_embedded_server(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADBANK_COMPONENTS", " my_losses, my_losses.pull ")
    with gradbank.connect("local://") as client:
        assert {"PullLoss", "ScaledDistance"} <= {info.name for info in client.catalog()}, "nothing here imported them"
        for i, loss in enumerate(own_losses()):
            assert_equal_to_local(client.open(f"run-{i}", loss), loss.rebuilt())


def test_a_server_without_it_names_the_setting(package: Path) -> None:
    with serving(package) as (address, _), gradbank.connect(address, timeout=20) as client:
        for loss in own_losses():
            with pytest.raises(
                InvalidComponent, match=r"no component is named .* --components \(GRADBANK_COMPONENTS\)"
            ):
                client.open("run", loss)
        assert client.sessions() == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"names 'mine', which is not installed where the server runs"),
        ({"mine.py": "import not_there"}, r"names 'mine', which needs 'not_there' where the server runs"),
        ({"mine.py": "1 / 0"}, r"names 'mine', and importing it failed: ZeroDivisionError: division by zero"),
        ({"mine.py": "def f(:"}, r"names 'mine', and importing it failed: SyntaxError"),
        ({"mine.py": "import torch"}, r"names 'mine', which registers no component: decorate its classes with"),
        (
            {"mine.py": LOSS.replace("PullLoss", "NTXentLoss")},
            r"names 'mine', and importing it failed: TypeError: two components are called NTXentLoss: .* one in mine",
        ),
    ],
    ids=["missing", "needs another", "fails", "no python", "no component", "a name that is taken"],
)
def test_a_package_that_cannot_be_hosted_stops_the_start(package: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (package / name).write_text(text)
    importlib.invalidate_caches()
    with pytest.raises(InvalidRequest, match=r"^--components \(GRADBANK_COMPONENTS\) " + message):
        Server(ServerSettings(port=0, components=("mine",)))


def test_it_is_an_error_of_one_line_and_a_code(package: Path) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "gradbank_server",
        "serve",
        "--port",
        "0",
        "--components",
        "my_losses,not_there",
    ]
    done = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "gradbank: --components (GRADBANK_COMPONENTS) names 'not_there', which is not installed"
    )


def test_a_package_that_only_passes_components_on_is_hosted(package: Path) -> None:
    (package / "entry.py").write_text("from my_losses.pull import PullLoss")
    importlib.invalidate_caches()
    import_components(["entry", "entry"])
    assert "PullLoss" in components()


def test_its_weights_count_towards_the_limit_of_a_session(package: Path) -> None:
    @component
    class Hungry(losses.Loss):
        rows: int = 10**9
        inner: list[losses.Loss] = field(default_factory=list)

        def __post_init__(self) -> None:
            self.weights = torch.nn.Parameter(torch.empty(self.rows, 10**3))

    device = torch.device("cpu")
    sessions = Sessions(build_loss, device, Limits(session_bytes=10**6), MemoryStorage(), time.monotonic)
    told = r"Hungry takes 4,000,000,000,000 bytes of weights and 0 of banks .* take 1,000,000"
    with pytest.raises(LimitExceeded, match=told):
        sessions.create("run", Spec("Hungry", {}), {})
    arc = Spec("ArcFaceLoss", {"num_classes": 10**12, "embedding_size": 8})
    with pytest.raises(LimitExceeded, match="ArcFaceLoss with num_classes=1000000000000 and embedding_size=8"):
        sessions.create("run", Spec("Hungry", {"rows": 1, "inner": [arc]}), {})
    assert sessions.create("run", Spec("Hungry", {"rows": 1}), {})[1]


def test_the_catalog_shows_it(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.app(["catalog", "PullLoss", "--components", "my_losses"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("loss PullLoss(floor=0.1, ")
    assert "Pulls samples of one class together" in said
    assert said.rstrip().endswith('Paper:\n    Doe et al., "Pulling Without Pushing", JOURNAL 2024.')
    assert said.count("Pulling Without") == 1
    with pytest.raises(SystemExit) as ended:
        cli.app(["catalog", "--components", "not_there"])
    assert ended.value.code == 2
    assert "not_there" in capsys.readouterr().err
