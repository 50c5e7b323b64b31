"""`loom doctor`."""

from typing import Annotated

import typer
from rich.text import Text

from loom.bus.bus import Bus
from loom.runner.cli.entry import DEFAULT_URL, prepare, run_to_end
from loom.runner.cli.views.tables import console, one_line
from loom.runner.doctor.diagnosis import examine, examine_here
from loom.runner.doctor.findings import Finding
from loom.runner.settings import Settings
from loom.schemas.base import encode

EXAMPLES = """
    loom doctor
    loom doctor --here --json
"""
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    here: Annotated[
        bool, typer.Option("--here", help="Only check that the processes of this machine answer: a health check.")
    ] = False,
) -> None:
    """Check the cluster and suggest fixes. Exit code 1: a check fails; 3: no server."""
    findings = run_to_end(_examined(prepare("error"), here=here))
    screen = console()
    for finding in findings:
        if as_json:
            typer.echo(encode(finding))
        else:
            screen.print(_line(finding), soft_wrap=True)
    if any(finding.mark == "fail" for finding in findings):
        raise typer.Exit(1)


async def _examined(settings: Settings, *, here: bool) -> list[Finding]:
    async with Bus(
        settings.nats_url or DEFAULT_URL,
        namespace=settings.loom_namespace,
        role="operator",
        identity=settings.identity,
    ) as bus:
        return await (examine_here(bus) if here else examine(bus, settings.cluster))


def _line(finding: Finding) -> Text:
    mark = (f"{finding.mark:<5}", _COLOURS[finding.mark])
    return Text.assemble(
        mark,
        (f"{finding.about:<15}", "bold"),
        one_line(f"{finding.message} → {finding.todo}" if finding.todo else finding.message),
    )
