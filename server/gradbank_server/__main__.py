"""`python -m gradbank_server`, the same as `gradbank`."""

from gradbank_server.cli import main

main()
