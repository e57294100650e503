"""The gradbank service: sessions that hold losses, behind gRPC or in this very process."""

from gradbank import __version__

__all__ = ["__version__"]
