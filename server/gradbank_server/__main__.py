"""`python -m gradbank_server`, the same as `gradbank`."""

import sys


def main() -> None:
    """The console script. The library alone installs it too, and then it says what it lacks."""
    try:
        from gradbank_server.cli import app
    except ModuleNotFoundError as error:
        sys.exit(
            f"gradbank: the command line needs {error.name}, which is not installed: pip install 'gradbank[server]'"
        )
    sys.exit(app())


if __name__ == "__main__":
    main()
