"""`loom node`: with a file it hosts the file's nodes, with the name of a command it runs that."""

from typing import Any

import typer
from typer.core import TyperGroup

from loom.runner.cli.commands import node_move, up

HOST = "host"
"""The command that `loom node FILE.py` is short for."""


class _FileFirst(TyperGroup):
    """A group that takes anything but the name of one of its commands as the arguments of `host`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the command in front where it is left out."""
        return super().parse_args(ctx, args if args and args[0] in self.commands else [HOST, *args])


app = typer.Typer(
    cls=_FileFirst,
    help="Host the nodes of a file: `loom node FILE.py`. `loom node move` is for a node with a new name.",
)
app.command(HOST)(up.node)
app.command()(node_move.move)
