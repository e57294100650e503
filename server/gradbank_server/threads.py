"""How a server's threads wait for one another."""

import os

_SPINS = "1000"  # some microseconds


def sleep_early() -> None:
    """Has torch's threads sleep soon after they ran out of work, unless the environment says how they are to wait.

    By default they look for more for milliseconds, on the processor that a trainer on the same machine wants: its step
    then waits until the system takes the processor away from them. To be called before torch is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
