"""A server of one's own, in a process of its own, for as long as a block of code runs."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradbank.errors import ServerUnavailable

_ADDRESS = re.compile(r'connect\("([^"]+)"\)')


@contextmanager
def hosted(*flags: str) -> Iterator[str]:
    """Starts `gradbank serve` on a free port of this machine, gives its address, and stops it at the end.

    Raises:
        ServerUnavailable: the server did not start.
    """
    command = [sys.executable, "-m", "gradbank_server", "serve", "--port", "0", "--metrics-port", "-1"]
    command += ["--log-level", "warning", *flags]
    # as many threads as here: sums are then added in the same order, and results are equal to the last bit
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield _address(process)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()


def _address(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    for line in process.stdout:
        found = _ADDRESS.search(line)
        if found:
            return found[1]
    raise ServerUnavailable(f"the server ended with status {process.wait()} before it listened")
