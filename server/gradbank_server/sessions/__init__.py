"""The state of the server. Knows torch and the library; knows no network, no file, no clock of its own."""

from gradbank_server.sessions.batch import (
    Answer,
    Backward,
    Batch,
    OptimizerSpec,
    OptimizerStep,
    Outcome,
    WeightEvent,
    ZeroGradient,
)
from gradbank_server.sessions.learner import is_out_of_memory
from gradbank_server.sessions.producers import Attachment
from gradbank_server.sessions.registry import Limits, Sessions
from gradbank_server.sessions.session import Run, Session, here
from gradbank_server.sessions.tally import Tally

__all__ = [
    "Answer",
    "Attachment",
    "Backward",
    "Batch",
    "Limits",
    "OptimizerSpec",
    "OptimizerStep",
    "Outcome",
    "Run",
    "Session",
    "Sessions",
    "Tally",
    "WeightEvent",
    "ZeroGradient",
    "here",
    "is_out_of_memory",
]
