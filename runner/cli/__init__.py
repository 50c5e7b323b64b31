"""The command line, `loom`. Importing it is quick: the commands are imported once the process is set up."""

from loom.runner.cli.start import main

__all__ = ["main"]
