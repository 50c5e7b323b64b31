"""`python -m loom.runner.cli` is `loom`."""

from loom.runner.cli.start import main

main()
