"""The container files say what the code says.

The machines that test gradbank have no Docker engine, so nothing is built here. These tests parse the files instead,
and hold every path, port, flag and metric that they name against the repository, the command line, the settings and the
registry.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILES = [ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.gpu"]
COMPOSE_FILES = [ROOT / "docker-compose.yml", ROOT / "docker" / "compose.gpu.yml"]
YAML_FILES = [*COMPOSE_FILES, *sorted((ROOT / "docker").rglob("*.yml"))]
DASHBOARDS = sorted((ROOT / "docker" / "grafana" / "dashboards").glob("*.json"))
DEPLOY_PAGE = ROOT / "docs" / "deploy.md"

each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
each_dashboard = pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.name)


# --- reading the files -----------------------------------------------------------------------------------------------


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, comments dropped and continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = (line.split(None, 1) for line in joined.splitlines() if line.strip())
    return [(instruction.upper(), arguments.strip()) for instruction, arguments in pairs]


def last_stage(dockerfile: Path) -> list[tuple[str, str]]:
    """The instructions that shape the image itself: those after the last FROM."""
    found = instructions(dockerfile)
    start = max(index for index, (instruction, _) in enumerate(found) if instruction == "FROM")
    return found[start:]


def argument(dockerfile: Path, instruction: str) -> str:
    """What the last `instruction` of the image is given; Docker obeys only the last one."""
    return [arguments for name, arguments in last_stage(dockerfile) if name == instruction][-1]


def copied_paths(dockerfile: Path) -> list[str]:
    """The paths that COPY takes from the repository, not those it takes from another stage."""
    sources = []
    for instruction, arguments in instructions(dockerfile):
        assert instruction != "ADD", "COPY says what it does; ADD also unpacks and downloads"
        if instruction == "COPY" and "--from=" not in arguments:
            sources += arguments.split()[:-1]
    return sources


def healthcheck(dockerfile: Path) -> list[str]:
    _, _, command = argument(dockerfile, "HEALTHCHECK").partition("CMD")
    parsed: list[str] = json.loads(command)
    return parsed


def services() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in COMPOSE_FILES:
        for name, service in yaml.safe_load(path.read_text())["services"].items():
            yield f"{path.name}: {name}", service


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language on the deployment page."""
    return re.findall(rf"^```{language}\n(.*?)^```", DEPLOY_PAGE.read_text(), re.MULTILINE | re.DOTALL)


def queries(dashboard: Path) -> list[str]:
    panels = json.loads(dashboard.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def gradbank_commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of `gradbank` in the container files and on the deployment page, without its name."""
    for dockerfile in DOCKERFILES:
        yield f"{dockerfile.name}: CMD", json.loads(argument(dockerfile, "CMD"))
        yield f"{dockerfile.name}: HEALTHCHECK", healthcheck(dockerfile)[1:]
    for name, service in services():
        if name.endswith("server") and "command" in service:
            yield f"{name}: command", service["command"]
        if "test" in service.get("healthcheck", {}):
            yield f"{name}: healthcheck", service["healthcheck"]["test"][2:]
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            # `gradbank ...` itself, in a running container, or as the arguments of an image's entry point.
            found = re.match(r"(?:docker compose exec server )?gradbank (.+)|docker run .*?gradbank:\w+ (.+)", line)
            if found:
                yield f"{DEPLOY_PAGE.name}: {line}", shlex.split(found[1] or found[2], comments=True)


# --- the files themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_yaml_file_parses(path: Path) -> None:
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@each_dashboard
def test_every_dashboard_parses_and_numbers_its_panels_once(dashboard: Path) -> None:
    panels = json.loads(dashboard.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 0


def test_every_yaml_block_of_the_deployment_page_parses() -> None:
    assert all(isinstance(document, dict) for block in blocks("yaml") for document in yaml.safe_load_all(block))


# --- paths -----------------------------------------------------------------------------------------------------------


@each_dockerfile
def test_every_copied_path_exists(dockerfile: Path) -> None:
    missing = [path for path in copied_paths(dockerfile) if not (ROOT / path).exists()]
    assert not missing


@each_dockerfile
def test_every_copied_path_is_let_into_the_build_context(dockerfile: Path) -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    for path in copied_paths(dockerfile):
        # The last pattern that matches decides; `!` lets a path in.
        deciding = [pattern for pattern in patterns if fnmatch(path, pattern.removeprefix("!"))][-1]
        assert deciding.startswith("!"), f"{path} is kept out by {deciding}"


@each_dockerfile
def test_everything_that_the_wheel_is_built_from_is_copied(dockerfile: Path) -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, hatch = pyproject["project"], pyproject["tool"]["hatch"]
    wheel = hatch["build"]["targets"]["wheel"]
    needed = [*wheel["packages"], *wheel.get("force-include", {}), *hatch["build"].get("force-include", {})]
    needed += [project["readme"]] if isinstance(project.get("readme"), str) else []
    needed += [hatch["version"]["path"]] if "path" in hatch.get("version", {}) else []
    needed += [match.name for pattern in project.get("license-files", []) for match in ROOT.glob(pattern)]
    copied = [Path(path) for path in copied_paths(dockerfile)]
    left_out = [path for path in needed if not any(Path(path).is_relative_to(parent) for parent in copied)]
    assert not left_out


@each_dockerfile
def test_every_installed_extra_exists(dockerfile: Path) -> None:
    extras = re.findall(r"\"\.\[([\w,-]+)\]\"", dockerfile.read_text())
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras
    assert {name for group in extras for name in group.split(",")} <= set(declared)


def test_every_build_path_and_mounted_path_exists() -> None:
    # Compose resolves every file's paths against the folder of the first one, which is the root.
    for name, service in services():
        build = service.get("build", {})
        paths = [build[key] for key in ("context", "dockerfile") if key in build]
        paths += [volume.split(":")[0] for volume in service.get("volumes", []) if volume.startswith(".")]
        missing = [path for path in paths if not (ROOT / path).exists()]
        assert not missing, name


def test_grafana_finds_the_dashboards_where_compose_mounts_them() -> None:
    grafana = yaml.safe_load(COMPOSE_FILES[0].read_text())["services"]["grafana"]
    mounts = {target: ROOT / source for source, target, _ in (volume.split(":") for volume in grafana["volumes"])}
    (provider,) = yaml.safe_load((mounts["/etc/grafana/provisioning/dashboards"] / "gradbank.yml").read_text())[
        "providers"
    ]
    shown = mounts[provider["options"]["path"]]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert sorted(shown.glob("*.json")) == DASHBOARDS != []
    assert shown / home.name in DASHBOARDS
    assert str(home.parent) == provider["options"]["path"]


def test_every_service_address_in_the_provisioning_names_a_service() -> None:
    compose = yaml.safe_load(COMPOSE_FILES[0].read_text())["services"]
    (source,) = yaml.safe_load((ROOT / "docker/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    (job,) = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert source["url"].removeprefix("http://").split(":")[0] in compose
    for target in job["static_configs"][0]["targets"]:
        assert target.split(":")[0] in compose


# --- safety ----------------------------------------------------------------------------------------------------------


@each_dockerfile
def test_the_image_does_not_run_as_root(dockerfile: Path) -> None:
    defaults = dict(given.split("=", 1) for name, given in last_stage(dockerfile) if name == "ARG")
    user = argument(dockerfile, "USER").replace("${UID}", defaults["UID"])
    uid, _, gid = user.partition(":")
    assert int(uid) > 0
    assert int(gid) > 0


@each_dockerfile
def test_signals_reach_the_server_itself(dockerfile: Path) -> None:
    # A shell as process 1 would swallow SIGTERM, and every stop would cut the steps in flight.
    assert json.loads(argument(dockerfile, "ENTRYPOINT")) == ["gradbank"]
    assert isinstance(json.loads(argument(dockerfile, "CMD")), list)
    assert argument(dockerfile, "STOPSIGNAL") == "SIGTERM"


def test_every_healthcheck_is_in_exec_form() -> None:
    for dockerfile in DOCKERFILES:
        assert healthcheck(dockerfile)[:2] == ["gradbank", "health"]
    checks = {name: service["healthcheck"] for name, service in services() if "healthcheck" in service}
    assert "docker-compose.yml: server" in checks
    for name, check in checks.items():
        assert check.get("test", ["CMD"])[0] == "CMD", (
            f"{name}: CMD-SHELL would need a shell, and hides the exit status"
        )


def test_every_published_port_is_bound_to_loopback() -> None:
    published = {name: service["ports"] for name, service in services() if "ports" in service}
    assert "docker-compose.yml: server" in published
    for name, ports in published.items():
        exposed = [port for port in ports if not str(port).startswith("127.0.0.1:")]
        assert not exposed, name


def test_no_file_names_a_package_index() -> None:
    # Where packages come from is the builder's affair: TORCH_INDEX is an argument, and its default is empty.
    for path in [*DOCKERFILES, *COMPOSE_FILES]:
        assert not re.search(r"--(extra-)?index-url|--find-links|https?://", path.read_text()), path.name


def test_both_images_differ_only_in_base_and_extra() -> None:
    cpu, gpu = (dict(last_stage(dockerfile)) for dockerfile in DOCKERFILES)
    for instruction in ("USER", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD", "WORKDIR", "COPY"):
        assert cpu[instruction] == gpu[instruction], instruction
    assert healthcheck(DOCKERFILES[0]) == healthcheck(DOCKERFILES[1])


# --- what the code says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "tokens"), [pytest.param(*found, id=found[0]) for found in gradbank_commands()])
def test_every_gradbank_command_is_accepted_by_the_command_line(where: str, tokens: list[str]) -> None:
    from gradbank_server.cli import app

    # Raises on a command, a flag or a value that the command line does not know.
    app.parse_args(tokens, exit_on_error=False, print_error=False)


def default_ports() -> tuple[int, int]:
    from gradbank_server.settings import ServerSettings

    settings = ServerSettings()
    return settings.port, settings.metrics_port


@each_dockerfile
def test_the_image_exposes_the_ports_that_the_settings_default_to(dockerfile: Path) -> None:
    assert tuple(int(port) for port in argument(dockerfile, "EXPOSE").split()) == default_ports()


@each_dockerfile
def test_the_healthcheck_asks_the_port_that_the_settings_default_to(dockerfile: Path) -> None:
    address = healthcheck(dockerfile)[healthcheck(dockerfile).index("--address") + 1]
    assert address == f"127.0.0.1:{default_ports()[0]}"


def test_compose_publishes_the_ports_that_the_settings_default_to() -> None:
    server = yaml.safe_load(COMPOSE_FILES[0].read_text())["services"]["server"]
    assert [int(port.rsplit(":", 1)[1]) for port in server["ports"]] == list(default_ports())


def test_prometheus_scrapes_the_port_that_the_settings_default_to() -> None:
    (job,) = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"server:{default_ports()[1]}"]


def test_every_kubernetes_probe_asks_the_port_that_the_settings_default_to() -> None:
    documents = [document for block in blocks("yaml") for document in yaml.safe_load_all(block)]
    (workload,) = [document for document in documents if document.get("kind") == "StatefulSet"]
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["grpc"]["port"] == default_ports()[0], probe


def exported_samples() -> set[str]:
    """The name of every sample that the server's registry can export, whether or not it has a value yet."""
    from gradbank_server.stats.metrics import Metrics

    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"]}
    families = Metrics().registry.collect()
    return {family.name + suffix for family in families for suffix in suffixes.get(family.type, [""])}


@each_dashboard
def test_every_metric_of_a_dashboard_is_exported_by_the_server(dashboard: Path) -> None:
    variables = json.loads(dashboard.read_text())["templating"]["list"]
    asked = [*queries(dashboard), *(variable["definition"] for variable in variables if variable["type"] == "query")]
    named = {name for query in asked for name in re.findall(r"\bgradbank_\w+", query)}
    assert named
    assert named <= exported_samples()


@each_dashboard
def test_every_metric_of_the_server_is_on_a_dashboard(dashboard: Path) -> None:
    named = {name for query in queries(dashboard) for name in re.findall(r"\bgradbank_\w+", query)}
    own = {name for name in exported_samples() if name.startswith("gradbank_")}
    assert own <= named, "a metric that nobody looks at is a cost: show it or drop it"
