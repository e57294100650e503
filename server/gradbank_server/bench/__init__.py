"""`gradbank bench`: where the time of a step goes, on a server of the user's own and over his own network."""

from gradbank_server.bench.course import PHASES, Course, Workload, bench

__all__ = ["PHASES", "Course", "Workload", "bench"]
