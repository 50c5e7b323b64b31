"""Parsing of `loom` command lines without running them."""

from collections.abc import Sequence
from typing import Any

import typer

from loom.runner.cli.app import app


def parse_command(words: Sequence[str]) -> str:
    """Return the first word of a command line that parses, or raise its usage error; `words` follow `loom`."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("loom", list(words), resilient_parsing=False)
    first = ""
    while hasattr(group, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, group, rest = group.resolve_command(context, rest)
        context = group.make_context(name, rest, parent=context)
        first = first or str(name)
    return first
