"""What a server tells of itself and its sessions."""

from dataclasses import dataclass
from typing import Any

from gradbank.remote.transport import Watched
from gradbank.spec import Spec
from gradbank.v1 import catalog_pb2, session_pb2, stats_pb2
from gradbank.wire import seconds_of_both, shape_of, spec_of


@dataclass(frozen=True)
class SessionStats:
    """What a session has been doing.

    Attributes:
        last_loss, mean_loss: NaN before the first step; the mean runs over about 100 steps.
        mean_seconds: of a step, by the phases of `RemoteLoss.timings`, in their order.
        statistics: what the loss and its parts collected of the last step, by the way to each:
            "distance.final_avg_query_norm".
        idle_s: seconds since the last step; NaN before the first.
    """

    session: str
    steps: int
    replayed: int
    rejected: int
    optimizer_steps: int
    last_loss: float
    mean_loss: float
    bank_rows: int
    bank_capacity: int
    bank_bytes: int
    weight_bytes: int
    received_bytes: int
    sent_bytes: int
    age_s: float
    idle_s: float
    mean_seconds: dict[str, float]
    statistics: dict[str, float]

    @staticmethod
    def of(message: stats_pb2.SessionStats) -> "SessionStats":
        plain: dict[str, Any] = {
            each.name: getattr(message, each.name)
            for each in message.DESCRIPTOR.fields
            if not each.name.endswith("_timings") and each.name != "statistics"
        }
        seconds = seconds_of_both(message.mean_trainer_timings, message.mean_timings)
        return SessionStats(**plain, mean_seconds=seconds, statistics=dict(message.statistics))


class StatsWatch:
    """Statistics of a session as they come, until it ends; see `Client.watch`."""

    def __init__(self, watched: Watched, client: object) -> None:
        self._watched, self._client = watched, client  # whose connection is to last as long

    def __iter__(self) -> "StatsWatch":
        return self

    def __next__(self) -> SessionStats:
        """The next ones; waits for them.

        Raises:
            SessionNotFound: there is no session of that name.
            DeadlineExceeded: they are late by more than any call may take.
        """
        return SessionStats.of(next(self._watched).stats)

    def close(self) -> None:
        """Watches no longer; a thread that waits for the next statistics is told that there are none."""
        self._watched.close()


@dataclass(frozen=True)
class ServerInfo:
    """What a server is, and what it allows: sizes in bytes.

    Attributes:
        unix_socket, shared_memory_socket: where else it listens, as it tells clients on its machine; empty if nowhere.
    """

    version: str
    device: str
    boot_id: str
    max_sessions: int
    max_session_bytes: int
    max_step_bytes: int
    sessions: int
    torch_version: str
    unix_socket: str
    shared_memory_socket: str

    @staticmethod
    def of(message: stats_pb2.GetServerResponse) -> "ServerInfo":
        return ServerInfo(**{each.name: getattr(message, each.name) for each in message.DESCRIPTOR.fields})


@dataclass(frozen=True)
class SessionInfo:
    """A session: its name, what it computes, the ranks that are attached and the steps carried out.

    Tensors among the arguments of its loss are of the device "meta": what they are, without their entries.
    """

    name: str
    loss: Spec
    optimizer: str | None
    ranks: tuple[int, ...]
    steps: int

    @staticmethod
    def of(message: session_pb2.Session) -> "SessionInfo":
        optimizer = message.optimizer.name if message.HasField("optimizer") else None
        return SessionInfo(
            message.name, spec_of(message.loss, tensors=shape_of), optimizer, tuple(message.ranks), message.steps
        )


@dataclass(frozen=True)
class ComponentInfo:
    """A component that a server can build; `arguments` are `(name, type, default)`, the default None if required.

    `paper` is where it was published, one publication a line.
    """

    name: str
    kind: str
    documentation: str
    arguments: tuple[tuple[str, str, str | None], ...]
    paper: str = ""

    @staticmethod
    def of(message: catalog_pb2.ComponentInfo) -> "ComponentInfo":
        arguments = tuple(
            (each.name, each.type, each.default if each.HasField("default") else None) for each in message.arguments
        )
        return ComponentInfo(message.name, message.kind, message.documentation, arguments, message.paper)
