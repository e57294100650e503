"""The gradbank service: sessions that hold losses, behind gRPC or in this very process."""
