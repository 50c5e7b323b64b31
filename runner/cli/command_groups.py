"""Command groups: `loom task`, `loom node` and the like."""

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

NO_TYPE = " "
"""Shown in the place of an option's type."""


class _PlainFlags:
    """Shows flags without a type: `--json`, not `--json <bool>`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters as the base class does."""
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]  # of the command it is mixed into
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = NO_TYPE
        return parameters


class Command(_PlainFlags, TyperCommand):
    """A command whose help shows flags without a type."""


class Group(_PlainFlags, TyperGroup):
    """A group whose help shows flags without a type."""


class Commands(typer.Typer):
    """A collection of commands; each has its examples at the end of its help."""

    def add(self, function: Callable[..., Any], examples: str, **options: Any) -> None:
        """Add a function as the command of its name.

        Args:
            examples: Command lines, one a line.
            options: As of `typer.Typer.command`.
        """
        self.command(cls=Command, epilog=epilog(examples), **options)(function)


def command_group(description: str, examples: str, *commands: Callable[..., Any]) -> Commands:
    """Return a group of commands; without a command it prints its help.

    Args:
        description: First line of the help.
        examples: Command lines, one a line; each command shows those that are its own.
        commands: Functions with the names of the commands.
    """
    group = Commands(cls=Group, help=description, epilog=epilog(examples))

    @group.callback(invoke_without_command=True)
    def show_help(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    for command in commands:
        own = [line for line in examples.splitlines() if f" {command.__name__}" in line]
        group.add(command, "\n".join(own))
    return group


def epilog(examples: str) -> str:
    """Return examples as the end of a help text."""
    lines = [f"  {line.strip()}" for line in examples.strip().splitlines()]
    return "\n".join(("Examples:", *lines)) if lines else ""
