"""The command line, `loom`. Importing it is quick: the commands are imported once the process is set up."""

from loom.runner.cli.process_start import main

__all__ = ["main"]
