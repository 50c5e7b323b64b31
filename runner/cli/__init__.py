"""The command line, `loom`."""

from loom.runner.cli.app import main

__all__ = ["main"]
