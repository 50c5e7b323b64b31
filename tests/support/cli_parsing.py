"""Whether a command line of `loom` is one."""

from collections.abc import Sequence
from typing import Any

import typer

from loom.runner.cli.app import app


def accepted(words: Sequence[str]) -> str:
    """Return the first word of `words` (those after `loom`) if they would run; raise the usage error otherwise."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("loom", list(words), resilient_parsing=False)
    first = ""
    while hasattr(group, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, group, rest = group.resolve_command(context, rest)
        context = group.make_context(name, rest, parent=context)
        first = first or str(name)
    return first
