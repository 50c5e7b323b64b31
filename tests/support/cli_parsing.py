"""Parsing of `loom` command lines without running them."""

from collections.abc import Sequence

import typer

from loom.runner.cli.app import app


def parse_command(words: Sequence[str]) -> str:
    """Return the command's name that `words` (those after `loom`) name, or raise its usage error."""
    group = typer.main.get_command(app)
    context = group.make_context("loom", list(words), resilient_parsing=False)
    rest = [*context._protected_args, *context.args]
    name, command, rest = group.resolve_command(context, rest)  # type: ignore[attr-defined]
    command.make_context(name, rest, parent=context)
    return str(name)
