"""The `loom` command: its table of contents, and how errors end it.

Exit codes: 0 done; 1 the work failed; 2 bad input; 3 no server, no phases, or another wire version; 130 interrupted.
"""

import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from loom.runner.cli.command_groups import Commands, Group, epilog
from loom.runner.cli.commands import backup, dead, doctor, host, init, node, phase, reward, run, submit, tap, task, up
from loom.runner.cli.process_exit import end
from loom.runner.cli.views.tables import one_line
from loom.schemas.errors import LoomError

_EXITS = {
    "bad_usage": 2,
    "invalid_file": 2,
    "invalid_setting": 2,
    "invalid_task": 2,
    "no_evidence": 2,
    "invalid_backup": 2,
    "streams_exist": 2,
    "bus_unavailable": 3,
    "wire_mismatch": 3,
}
_UsageError: type[Exception] = typer.BadParameter.__base__  # type: ignore[assignment]  # its base is an exception
"""Base class of all errors in a command line; typer exports only this subclass of it."""
DAILY, RESOURCES, ADMINISTRATION = "Daily", "Resources", "Administration"
EXAMPLES = """
    loom up
    loom host run agents.py
    loom submit "Summarise the attached notes"
    loom task ls
"""


class _InOrder(Group):
    """Lists the commands panel by panel, not commands first and groups second."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands, daily ones first."""
        panels = (DAILY, RESOURCES, ADMINISTRATION)
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: panels.index(getattr(self.commands[name], "rich_help_panel", DAILY)))


app = Commands(name="loom", cls=_InOrder, epilog=epilog(EXAMPLES), pretty_exceptions_enable=False)
for command, examples in (
    (up.up, up.EXAMPLES),
    (run.run, run.EXAMPLES),
    (submit.submit, submit.EXAMPLES),
    (tap.tap, tap.EXAMPLES),
    (doctor.doctor, doctor.EXAMPLES),
):
    app.add(command, examples, rich_help_panel=DAILY)
for group, name in (
    (task.app, "task"),
    (node.app, "node"),
    (host.app, "host"),
    (phase.app, "phase"),
    (reward.app, "reward"),
    (dead.app, "dead"),
):
    app.add_typer(group, name=name, rich_help_panel=RESOURCES)
app.add(init.init, init.EXAMPLES, rich_help_panel=ADMINISTRATION)
app.add(backup.backup, backup.EXAMPLES, rich_help_panel=ADMINISTRATION)
app.add(backup.restore, backup.EXAMPLES, rich_help_panel=ADMINISTRATION)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"loom {version('loom-nats')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def loom(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """A self-organising cluster of agents on NATS."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command of `sys.argv` and end the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # both are text files here
    end(_outcome())


def _outcome() -> int:
    try:
        code = app(prog_name="loom", standalone_mode=False) or 0
        sys.stdout.flush()
    except OSError as error:
        # What is still buffered cannot be written either, and must not fail again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if isinstance(error, BrokenPipeError) else _complain("io_error", error.strerror or str(error))
    except LoomError as error:
        return _complain(error.code, _with_field(error))
    except _UsageError as error:
        return _complain("bad_usage", error.format_message())  # type: ignore[attr-defined]  # every one has it
    except (KeyboardInterrupt, typer.Abort):
        return 130
    return code


def _with_field(error: LoomError) -> str:
    """The message, with the field that is to blame where the message does not name it."""
    field = error.field
    return error.message if not field or field in error.message else f"{error.message} (field {field})"


def _complain(code: str, message: str) -> int:
    typer.echo(f"{code}: {one_line(message)}", err=True)
    return _EXITS.get(code, 1)
