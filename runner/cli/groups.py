"""Command groups: `loom task`, `loom node` and the like."""

import typer


def command_group(description: str, examples: str) -> typer.Typer:
    """Return a group of commands; without a command it prints its help.

    Args:
        description: First line of the help.
        examples: Command lines, one a line.
    """
    group = typer.Typer(help=description, epilog=epilog(examples))

    @group.callback(invoke_without_command=True)
    def show_help(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    return group


def epilog(examples: str) -> str:
    """Return examples as the end of a help text."""
    return "Examples:\n" + "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())
