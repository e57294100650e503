"""What the server counts, as Prometheus sees it."""

from gradbank_server.stats.metrics import Metrics

__all__ = ["Metrics"]
