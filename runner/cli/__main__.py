"""`python -m loom.runner.cli` is `loom`."""

from loom.runner.cli.process_start import main

main()
