"""Every Python snippet of the documentation runs, and every command it names exists."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gradbank.component import components
from gradbank_server.cli import app
from gradbank_server.service import Server

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (gradbank .*)$", re.MULTILINE)
LINK = re.compile(r"\]\((?!http)([^)#]+)\)")


def pages_with(pattern: re.Pattern[str]) -> list[Path]:
    return [page for page in PAGES if pattern.search(page.read_text())]


def a_users_trainer() -> dict[str, object]:
    """The names that the README's loop takes from its reader."""
    model = nn.Linear(16, 128)
    loader = [(torch.randn(8, 16), torch.arange(8) // 2) for _ in range(3)]
    return {"model": model, "loader": loader, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}


@pytest.mark.parametrize("page", pages_with(SNIPPET), ids=lambda page: page.name)
def test_every_snippet_runs(page: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    # what a snippet registers ends with it; gradbank.component is the decorator, and hides its module of that name
    monkeypatch.setattr(sys.modules["gradbank.component"], "_REGISTRY", components())
    names: dict[str, object] = {"__name__": f"snippets_of_{page.stem}", **a_users_trainer()}
    for snippet in SNIPPET.findall(page.read_text()):
        exec(compile(snippet.replace("gpu-box:50051", server.address), str(page), "exec"), names)


def test_the_readme_loop_trains_the_model(server: Server) -> None:
    trainer = a_users_trainer()
    model = trainer["model"]
    assert isinstance(model, nn.Linear)
    before = model.weight.detach().clone()
    first = SNIPPET.findall((ROOT / "README.md").read_text())[0]
    exec(first.replace("gpu-box:50051", server.address).replace("my-run", "readme"), trainer)
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("page", pages_with(COMMAND), ids=lambda page: page.name)
def test_every_command_is_one(page: Path) -> None:
    for line in COMMAND.findall(page.read_text()):
        app.parse_args(shlex.split(line)[1:], exit_on_error=False, print_error=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_make_target_of_the_contributing_page_exists() -> None:
    targets = re.findall(r"(?:^    |`)make (\w+)", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
