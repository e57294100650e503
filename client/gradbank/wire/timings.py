"""Where the time of a step went: as messages have it, and in seconds by phase."""

from gradbank.v1 import step_pb2

_LAST = "client_decode"


def seconds_of(timings: step_pb2.Timings | step_pb2.TrainerTimings) -> dict[str, float]:
    """The seconds of one side, by phase, as far as they are known."""
    return {
        each.name.removesuffix("_s"): getattr(timings, each.name)
        for each in timings.DESCRIPTOR.fields
        if not each.has_presence or timings.HasField(each.name)  # type: ignore[arg-type]  # each has its own names
    }


def seconds_of_both(trainer: step_pb2.TrainerTimings, server: step_pb2.Timings) -> dict[str, float]:
    """The seconds of a step, by phase, in the order in which they pass."""
    here = seconds_of(trainer)
    last = here.pop(_LAST)
    return {**here, **seconds_of(server), _LAST: last}
