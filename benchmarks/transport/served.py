"""A server as a user starts it."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served() -> Iterator[str]:
    """The address of one that listens in every way and knows the echo."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gradbank_server", "serve", "--port", "0", "--metrics-port", "-1"]
        command += ["--unix-socket", f"{folder}/gradbank", "--shared-memory", "--components", "echo"]
        here = Path(__file__).parent  # where it finds the loss
        with subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
            assert run.stdout is not None
            try:
                lines = iter(run.stdout.readline, "")
                yield next(found[1] for line in lines if (found := re.search(r"listening +(\S+)", line)))
            finally:
                run.terminate()
