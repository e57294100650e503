"""`python -m gradbank_server`, the same as `gradbank`."""

import errno
import os
import sys

_NOWHERE = (errno.EPIPE, errno.ENOSPC, errno.EBADF)  # a reader that is gone, a full disk, a closed stream


def main() -> None:
    """The console script. The library alone installs it too, and then it says what it lacks."""
    try:
        from gradbank_server.cli import app
    except ModuleNotFoundError as error:
        sys.exit(
            f"gradbank: the command line needs {error.name}, which is not installed: pip install 'gradbank[server]'"
        )
    try:
        code = app()
    except OSError as error:
        if error.errno not in _NOWHERE:
            raise
        code = f"gradbank: {error.strerror}"
    finally:
        _flush()
    sys.exit(code)


def _flush() -> None:
    """What could not be written is not to be written again as Python ends, whose exit code would then be another."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
