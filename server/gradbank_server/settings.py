"""What can be set when a server starts: flags, GRADBANK_* in the environment, or these defaults."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def _separated(value: Any) -> Any:
    """Names as the environment or a flag gives them: `a,b` is two."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
        return value
    return tuple(name.strip() for each in given for name in each.split(",") if name.strip())


_MOST = 2**63 - 1  # which messages and torch can hold


class ServerSettings(BaseSettings):
    """The settings of a server; each is a flag of `gradbank serve` and a variable GRADBANK_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="GRADBANK_", extra="forbid")

    host: Annotated[str, Field(description="Address to listen on; anything but loopback needs --insecure.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on; 0 picks a free one.")] = 50051
    unix_socket: Annotated[
        str, Field(description="Listen on this socket of the file system too, which only the server's user may open.")
    ] = ""
    shared_memory: Annotated[
        bool, Field(description="Exchange steps through shared memory with trainers of this user on this machine.")
    ] = False
    metrics_port: Annotated[
        int, Field(ge=-1, le=65535, description="Port of Prometheus /metrics; 0 picks a free one, -1 is none.")
    ] = 9464
    device: Annotated[str, Field(description="Where losses are computed: auto, cpu, cuda or cuda:N.")] = "auto"
    insecure: Annotated[
        bool, Field(description="Listen beyond loopback although there is neither TLS nor authentication yet.")
    ] = False
    components: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_separated),
        Field(description="Packages of your own whose components are hosted: importable here, comma-separated."),
    ] = ()
    max_sessions: Annotated[int, Field(ge=1, le=_MOST, description="How many sessions there may be.")] = 64
    max_session_bytes: Annotated[
        int,
        Field(
            ge=1,
            le=_MOST,
            description="How many bytes the bank, counted as float32, and the weights of a session may take.",
        ),
    ] = 8 * 2**30
    max_step_bytes: Annotated[
        int, Field(ge=1, le=_MOST, description="How many bytes the tensors of a step may take.")
    ] = 256 * 2**20
    max_shared_bytes: Annotated[
        int, Field(ge=1, le=_MOST, description="How many bytes may be shared with trainers at once, all together.")
    ] = 2**30
    max_streams: Annotated[int, Field(ge=1, le=_MOST, description="How many calls may be under way at once.")] = 128
    drain_seconds: Annotated[
        float, Field(ge=0, description="How long SIGTERM waits for the steps that are under way.")
    ] = 20.0
    reflection: Annotated[bool, Field(description="Offer gRPC reflection, for tools like grpcurl.")] = True
    log_format: Annotated[
        Literal["auto", "console", "json"], Field(description="auto is console on a terminal, JSON lines otherwise.")
    ] = "auto"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Field(description="The least to log.")] = "info"


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """The variables that look like settings and are none, each with the setting that may be meant."""
    prefix = ServerSettings.model_config["env_prefix"]
    known = [f"{prefix}{name}".upper() for name in ServerSettings.model_fields]
    unknown = [name for name in environment if name.upper().startswith(prefix) and name.upper() not in known]
    return {name: next(iter(difflib.get_close_matches(name.upper(), known, 1, 0.8)), None) for name in sorted(unknown)}
