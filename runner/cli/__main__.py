"""`python -m loom.runner.cli` is `loom`."""

from loom.runner.cli.app import main

main()
