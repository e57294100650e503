"""Where the time of a step went: as messages have it, and in seconds by phase."""

from gradbank.v1 import step_pb2


def seconds_of(timings: step_pb2.Timings | step_pb2.TrainerTimings) -> dict[str, float]:
    """The seconds of one side, by phase."""
    return {each.name.removesuffix("_s"): getattr(timings, each.name) for each in timings.DESCRIPTOR.fields}


def seconds_of_both(trainer: step_pb2.TrainerTimings, server: step_pb2.Timings) -> dict[str, float]:
    """The seconds of a step, by phase, in the order in which they pass."""
    return {
        "client_encode": trainer.client_encode_s,
        "network": trainer.network_s,
        **seconds_of(server),
        "client_decode": trainer.client_decode_s,
    }
