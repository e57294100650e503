"""The command line: `gradbank serve | demo | bench | health | sessions | close | catalog`.

Commands import what they need when they run: `gradbank health`, which containers ask every few seconds, needs no torch.
"""

import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import structlog
from cyclopts import App, Parameter
from pydantic import ValidationError

from gradbank_server.printed import described, duration, listed, ranges, started, times
from gradbank_server.settings import ServerSettings, unknown_variables
from gradbank_server.terminal import console, failed, refused, show, table_of, told

app = App(
    name="gradbank",
    help="Metric-learning losses and memory banks, served over gRPC: a batch goes up, loss and gradients come back.",
    version=lambda: version("gradbank"),
    default_parameter=Parameter(negative_iterable=()),
    error_formatter=lambda error: f"gradbank: {told(error)}",
)


_LONGEST_S = 10 * 365 * 24 * 3600.0  # as in `gradbank.wire`, which imports torch
_HERE = ("127.0.0.1", "localhost", "[::1]")  # as in `gradbank.remote.channel`, which does too
_LOST_DEVICE = 70  # what a supervisor starts again

Address = Annotated[str, Parameter(help="host:port of the server, or unix:///path.")]
Timeout = Annotated[float, Parameter(help="Seconds to wait for an answer.")]


@app.command
def serve(*, settings: Annotated[ServerSettings | None, Parameter(name="*")] = None) -> int:
    """Start a server, and serve until SIGTERM, SIGHUP or Ctrl-C; ends with 70 if a GPU is lost to it.

    Every flag can be given as an environment variable: --max-sessions as GRADBANK_MAX_SESSIONS.
    """
    from gradbank_server.allocator import use_one_arena
    from gradbank_server.threads import sleep_between_steps

    use_one_arena()  # before torch and gRPC start threads
    sleep_between_steps()
    from gradbank.errors import GradbankError
    from gradbank_server.logs import configure
    from gradbank_server.service import Server

    try:
        settings = settings or ServerSettings()
    except ValidationError as error:
        return failed(refused(error))
    configure(settings.log_format, settings.log_level)
    for name, meant in unknown_variables(os.environ).items():
        structlog.get_logger().warning("no setting has this name", variable=name, did_you_mean=meant)
    _find_beside(settings)
    ended, lost = threading.Event(), threading.Event()

    def give_up() -> None:
        lost.set()
        ended.set()

    ending = [signal.SIGTERM, signal.SIGINT]  # also where a shell that starts a job in the background ignores these
    hangup = getattr(signal, "SIGHUP", None)  # which not every system has, and `nohup` ignores
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        ending.append(hangup)
    for number in ending:
        signal.signal(number, lambda *_: ended.set())
    try:
        server = Server(settings, give_up)
        server.start()
    except (GradbankError, OSError) as error:
        return failed(error)
    with suppress(OSError):  # a server serves, whether or not there is room to say so
        console.print(started(server), highlight=False, markup=False, soft_wrap=True)
        console.file.flush()
    ended.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
    server.stop()
    if lost.is_set():
        failed(f"{server.service.device} failed, and this process cannot use it any more: start the server again")
        sys.stderr.flush()
        os._exit(_LOST_DEVICE)  # what it left on the device could keep the process
    if server.computes:
        failed("a step outlasted --drain-seconds, and was given up")
        sys.stderr.flush()
        os._exit(1)  # its thread would keep the process
    return 0


@app.command
def demo(
    *,
    steps: Annotated[int | None, Parameter(help="Training steps; the default takes about a minute.")] = None,
    picture: Annotated[Path, Parameter(help="Where to save the picture.")] = Path("demo.png"),
    cache: Annotated[Path | None, Parameter(help="Where the glyph images are kept.")] = None,
) -> int:
    """Train a small network through a real server, and check every gradient that matters.

    Exits with 1 if the network did not learn, or a remote gradient differs from the one computed here.
    """
    from gradbank_server.threads import sleep_between_steps

    sleep_between_steps()  # trainer and server share this machine
    from gradbank.errors import GradbankError
    from gradbank_server.bench.picture import check_drawable
    from gradbank_server.demo import run

    if steps is not None and steps < 1:
        return failed(f"--steps must be at least 1, got {steps}")
    try:
        check_drawable(picture)  # before the time is spent
        return run(steps, picture, cache)
    except (GradbankError, ImportError) as error:
        return failed(error)


@app.command
def bench(
    *,
    address: Address = "127.0.0.1:50051",
    batch: Annotated[int, Parameter(help="Rows of a batch.")] = 256,
    dimension: Annotated[int, Parameter(help="Numbers of a row.")] = 128,
    bank: Annotated[int, Parameter(help="Rows of the bank; 0 compares each batch with itself.")] = 8192,
    steps: Annotated[int, Parameter(help="How many steps are measured.")] = 200,
    timeout: Timeout = 30.0,
    via: Annotated[
        Literal["auto", "shm", "unix", "tcp"], Parameter(help="How to go to the server; auto is the fastest way.")
    ] = "auto",
    picture: Annotated[Path | None, Parameter(help="Where to save a picture of it: .png, .svg or .pdf.")] = None,
) -> int:
    """Measure where the time of a step goes, over your network and on your server."""
    from gradbank.errors import GradbankError
    from gradbank_server.bench import Workload
    from gradbank_server.bench import bench as measured
    from gradbank_server.bench.picture import check_drawable, draw

    if batch < 8 or dimension < 1 or bank < 0 or steps < 1 or 0 < bank < batch:
        return failed("a batch has at least 8 rows of at least 1 number, a bank at least the batch's, and steps 1")
    workload = Workload(batch, dimension, bank, steps)
    try:
        if picture is not None:
            check_drawable(picture)  # before the time is spent
        with _ended_by_sigterm():
            course, server = measured(address, timeout, workload, via)
    except (GradbankError, RuntimeError) as error:  # torch's own, where there is no room here
        return failed(error)
    console.print(f"{workload}\n{address}: {server}\n", highlight=False)
    console.print(times(course))
    console.print(f"\n{course.advice()}", highlight=False)
    if picture is not None:
        try:
            draw(picture, course, f"{workload}\n{address}: {server}")
        except OSError as error:
            return failed(f"the picture cannot be saved: {error}")
        console.print(f"\nsaved {picture}", highlight=False)
    return 0


@app.command
def health(*, address: Address = "127.0.0.1:50051", timeout: Timeout = 2.0) -> int:
    """Ask a server whether it serves: exits with 0 if it does. For container health checks."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    if not timeout > 0:
        return failed(f"--timeout must be above 0 seconds, got {timeout}")
    # no proxy leads to this machine, where a container asks itself
    here = address.rpartition(":")[0] in _HERE or address.startswith("unix:")
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", int(not here))]) as channel:
        try:
            request = health_pb2.HealthCheckRequest()
            call = health_pb2_grpc.HealthStub(channel).Check
            status = call(request, timeout=min(timeout, _LONGEST_S), wait_for_ready=True).status
        except grpc.RpcError as error:
            why = error.code().name
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                why = f"no server answered within {timeout:g} s"
            with suppress(OSError):
                console.print(f"{address}: {why}", style="red", highlight=False, markup=False)
            return 1
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    with suppress(OSError):  # the exit code is the answer
        console.print(f"{address}: {name}", markup=False)
    return 0 if status == health_pb2.HealthCheckResponse.SERVING else 1


@app.command
def sessions(*, address: Address = "127.0.0.1:50051", timeout: Timeout = 10.0) -> int:
    """List the sessions of a server."""
    import gradbank
    from gradbank.errors import GradbankError, SessionNotFound

    table = table_of("session", "loss", "ranks", "steps", "loss now", "bank rows", "ms per step", "idle")
    try:
        with gradbank.connect(address, timeout) as client:
            for session in client.sessions():
                try:
                    stats = client.stats(session.name)
                except SessionNotFound:  # it ended just now
                    continue
                table.add_row(
                    session.name,
                    session.loss.title(),
                    ranges(session.ranks),
                    f"{stats.steps:,}",
                    f"{stats.mean_loss:.4f}",
                    f"{stats.bank_rows:,} of {stats.bank_capacity:,}",
                    f"{1e3 * sum(stats.mean_seconds.values()):.2f}",
                    duration(stats.age_s if math.isnan(stats.idle_s) else stats.idle_s),
                )
    except GradbankError as error:
        return failed(error)
    if table.row_count:
        show(table)
    else:
        console.print(f"no sessions at {address}", markup=False)
    return 0


@app.command
def close(
    name: Annotated[str, Parameter(help="The session.")],
    /,
    *,
    address: Address = "127.0.0.1:50051",
    timeout: Timeout = 10.0,
) -> int:
    """End a session of a server, and free what it holds: its bank and weights are gone."""
    import gradbank
    from gradbank.errors import GradbankError
    from gradbank.suggestion import did_you_mean

    try:
        with gradbank.connect(address, timeout) as client:
            if not client.close_session(name):
                known = [session.name for session in client.sessions()]
                told = did_you_mean(name, known) if known else ""
                return failed(f"no session at {address} is called {name!r}{told}")
    except GradbankError as error:
        return failed(error)
    console.print(f"closed {name}", highlight=False, markup=False)
    return 0


@app.command
def catalog(
    name: Annotated[str | None, Parameter(help="A component; all of them if left out.")] = None,
    *,
    components: Annotated[str, Parameter(help="Packages of your own to list too; as for `gradbank serve`.")] = "",
) -> int:
    """List what a server can build: losses, distances, miners, reducers, regularizers."""
    from gradbank.errors import GradbankError
    from gradbank.remote.stats import ComponentInfo
    from gradbank.suggestion import did_you_mean
    from gradbank_server.build import import_components
    from gradbank_server.service.catalog import component_infos

    try:
        settings = ServerSettings(components=components) if components else ServerSettings()  # type: ignore[arg-type]
        _find_beside(settings)
        import_components(settings.components)
    except ValidationError as error:
        return failed(refused(error))
    except GradbankError as error:
        return failed(error)
    infos = {info.name: ComponentInfo.of(info) for info in component_infos()}
    if name is None:
        for kind in sorted({info.kind for info in infos.values()}):
            table, common = listed(kind, [info for info in infos.values() if info.kind == kind])
            console.print(table)
            if common:
                console.print(f" {common}", style="dim", highlight=False, markup=False)
            console.print()
        return 0
    if name not in infos:
        return failed(f"no component is named {name!r}{did_you_mean(name, infos)}")
    console.print(described(infos[name]), markup=False, highlight=False, soft_wrap=True)
    return 0


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Has SIGTERM end the block as Ctrl-C does, so that nothing is left on a server."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _find_beside(settings: ServerSettings) -> None:
    """Lets the packages named lie in the folder where the command was given; what is installed comes first."""
    if settings.components and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
