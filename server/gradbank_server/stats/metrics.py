"""The metrics on /metrics. No session is a label: names are the users', and there is no end to them."""

from collections.abc import Iterator
from typing import Any

import grpc
import torch
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from gradbank import __version__
from gradbank_server.sessions import Sessions

# gRFC A66's bounds, from 10 us on: the usual ones begin at 5 ms, where most steps have ended
_SECONDS = (
    1e-5, 5e-5, 1e-4, 3e-4, 6e-4, 8e-4, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3, 8e-3, 0.01, 0.013, 0.016, 0.02, 0.025,
    0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1, 2, 5, 10, 20, 50, 100,
)  # fmt: skip


class Metrics:
    """Counters that the service writes, and gauges read off the sessions when they are asked for."""

    def __init__(self, sessions: Sessions | None = None, device: str = "cpu") -> None:
        self.registry = CollectorRegistry()
        self._steps = Counter(
            "gradbank_steps",
            "Steps, by loss and outcome (ok, replayed, rejected, failed; told: nothing to compare; conflict: not the "
            "next number, as of what was sent behind a refused one).",
            ["loss", "outcome"],
            registry=self.registry,
        )  # fmt: skip
        self._seconds = Histogram(
            "gradbank_step_seconds", "Where the time of a step that compares went, by phase.", ["phase"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self._refusals = Counter(
            "gradbank_refusals", "Calls and streams that were refused, by error; steps are counted by outcome.",
            ["error"], registry=self.registry,
        )  # fmt: skip
        self._received = Counter(
            "gradbank_received_bytes", "Bytes received, of steps' tensors.", registry=self.registry
        )
        self._sent = Counter("gradbank_sent_bytes", "Bytes sent, of steps' tensors.", registry=self.registry)
        self.registry.register(_SessionGauges(sessions, device))

        self._of: dict[
            str | tuple[str, str], Any
        ] = {}  # what was counted before, by its labels: to look them up is slow

    def stepped(self, loss: str, outcome: str) -> None:
        of = self._of.get((loss, outcome)) or self._of.setdefault((loss, outcome), self._steps.labels(loss, outcome))
        of.inc()

    def refused(self, error: str) -> None:
        self._refusals.labels(error).inc()

    def timed(self, seconds: dict[str, float], received: int, sent: int) -> None:
        for phase, spent in seconds.items():
            of = self._of.get(phase) or self._of.setdefault(phase, self._seconds.labels(phase))
            of.observe(spent)
        self._received.inc(received)
        self._sent.inc(sent)


class _SessionGauges(Collector):
    def __init__(self, sessions: Sessions | None, device: str) -> None:
        self._sessions, self._device = sessions, device

    def collect(self) -> Iterator[Metric]:
        sessions = [] if self._sessions is None else self._sessions.all()
        banks = [bank for session in sessions for bank in session.banks]
        gauges: dict[str, tuple[str, Any]] = {
            "gradbank_sessions": ("Open sessions.", len(sessions)),
            "gradbank_bank_rows": ("Rows in all banks.", sum(len(bank) for bank in banks)),
            "gradbank_bank_bytes": ("Bytes of all banks.", sum(bank.nbytes for bank in banks)),
            "gradbank_weight_bytes": ("Bytes of all learnable weights.", sum(s.weight_bytes for s in sessions)),
            "gradbank_gradient_bytes": ("Bytes of their gradients.", sum(s.gradient_bytes for s in sessions)),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        build = {
            "version": __version__,
            "torch": torch.__version__,
            "grpc": grpc.__version__,
            "device": self._device,
        }
        yield InfoMetricFamily("gradbank_build", "What this server is.", value=build)
