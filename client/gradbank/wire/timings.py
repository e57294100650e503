"""Where the time of a step went: as messages have it, and in seconds by phase."""

from gradbank.v1 import step_pb2

_LAST = "client_decode"
_FIELDS = {  # by kind: each field's name, its phase, and whether it may be left out
    kind: tuple((each.name, each.name.removesuffix("_s"), each.has_presence) for each in kind.DESCRIPTOR.fields)
    for kind in (step_pb2.Timings, step_pb2.TrainerTimings)
}


def seconds_of(timings: step_pb2.Timings | step_pb2.TrainerTimings) -> dict[str, float]:
    """The seconds of one side, by phase, as far as they are known."""
    return {
        phase: getattr(timings, name)
        for name, phase, may_lack in _FIELDS[type(timings)]
        if not may_lack or timings.HasField(name)  # type: ignore[arg-type]  # each kind has its own names
    }


def seconds_of_both(trainer: step_pb2.TrainerTimings, server: step_pb2.Timings) -> dict[str, float]:
    """The seconds of a step, by phase, in the order in which they pass."""
    here = seconds_of(trainer)
    last = here.pop(_LAST)
    return {**here, **seconds_of(server), _LAST: last}
