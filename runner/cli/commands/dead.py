"""What could not be handled: `loom dead ls`, `show`, `retry`, `drop`."""

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loom.bus.dead_letters import admin
from loom.bus.dead_letters.admin import Letter
from loom.runner.cli.common import MANY, AsLines, add_row, clock, connected, print_json
from loom.runner.cli.entry import prepare, run_to_end
from loom.runner.cli.views.tables import console, one_line, printable, short, table_of
from loom.runner.settings import Settings
from loom.schemas.base import encode

BODY_LINES = 200
"""Most lines of a body that is JSON."""
BODY_BYTES = 2048
"""Most bytes of one that is not."""

LetterSeq = Annotated[int, typer.Argument(metavar="SEQ", min=1, help="Number of the letter, as `loom dead ls` has it.")]

app = typer.Typer()


@app.callback(invoke_without_command=True)
def dead(context: typer.Context) -> None:
    """Look at messages that could not be handled, hand their tasks in again, or drop them."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def ls(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many of those there are.")] = MANY,
    as_json: AsLines = False,
) -> None:
    """List the last dead letters, the newest at the end."""
    run_to_end(_ls(prepare("warning"), limit, as_json=as_json))


async def _ls(settings: Settings, limit: int, *, as_json: bool) -> None:
    async with connected(settings) as bus:
        found = await admin.list_letters(bus, limit)
    if as_json:
        for one in found:
            print_json(as_object(one))
        return
    screen = console()
    screen.print(_list(found) if found else "no dead letters")


def _list(found: Sequence[Letter]) -> Table:
    numbers = ("letter", "tries", "bytes")
    columns = ("letter", "at", "phase", "task", "tries", "bytes", "reason")
    table = table_of(columns, right=numbers, ratios={"reason": 1})
    for one in found:
        facts = one.facts
        counts = (str(facts.deliveries), f"{len(one.body)}{'+' if facts.cut else ''}")
        about = (one_line(facts.phase, 16), short(one_line(facts.task_id, 64)))
        add_row(table, str(one.seq), clock(one.stored_at), *about, *counts, one_line(facts.reason, 200))
    return table


@app.command()
def show(
    seq: LetterSeq,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, its bytes in base64.")] = False,
) -> None:
    """Show one dead letter: what is known of it, and what it says."""
    run_to_end(_show(prepare("warning"), seq, as_json=as_json))


async def _show(settings: Settings, seq: int, *, as_json: bool) -> None:
    async with connected(settings) as bus:
        found = await admin.get_letter(bus, seq)
    if as_json:
        print_json({**as_object(found), "message": _as_json(found.body), "raw": found.body})
        return
    screen = console()
    for name, text in _facts(found):
        screen.print(Text.assemble((f"{name:<9}", "dim"), one_line(text)))
    screen.print()
    _show_body(screen, found)


def _facts(found: Letter) -> Sequence[tuple[str, str]]:
    facts = found.facts
    times = "delivery" if facts.deliveries == 1 else "deliveries"
    known = facts.trail or facts.phase == "sense"  # where every trail begins
    return (
        ("letter", f"{found.seq}, of {clock(found.stored_at)}"),
        ("task", facts.task_id),
        ("reason", facts.reason),
        ("phase", f"{facts.phase}, after {facts.deliveries} {times}"),
        ("trail", " → ".join((*facts.trail.split(), facts.phase)) if known else "not known"),
        ("subject", f"{facts.subject}, sequence {facts.stream_seq}"),
        ("size", f"{len(found.body)} bytes{' are left of more' if facts.cut else ''}"),
    )


def _show_body(screen: Console, found: Letter) -> None:
    told = _as_json(found.body)
    if told is None:
        more = len(found.body) - BODY_BYTES
        screen.print(Text(escaped(found.body[:BODY_BYTES])))
        if more > 0:
            screen.print(Text(f"… and {more} more bytes; --json has them", "dim"))
        return
    lines = printable(msgspec.json.format(bytes(told), indent=2).decode()).splitlines()
    screen.print(Text("\n".join(lines[:BODY_LINES])))
    if len(lines) > BODY_LINES:
        screen.print(Text(f"… and {len(lines) - BODY_LINES} more lines; --json has them", "dim"))


def as_object(found: Letter) -> dict[str, Any]:
    """Return what is known of a letter as free JSON."""
    facts = msgspec.to_builtins(found.facts)
    return {"seq": found.seq, "at": found.stored_at, "size": len(found.body), **facts}


def _as_json(body: bytes) -> msgspec.Raw | None:
    """`body` on one line if it is JSON, number for number as it came; else None."""
    try:
        encode(msgspec.json.decode(body))  # what cannot be read or said again is shown as bytes
        return msgspec.Raw(msgspec.json.format(body, indent=-1))
    except (ValueError, RecursionError):
        return None


def escaped(raw: bytes) -> str:
    r"""Return `raw` as printable text: `\xff` for what is not UTF-8, `\x1b` for what steers a terminal."""
    text = raw.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@app.command()
def retry(seq: LetterSeq) -> None:
    """Hand the task of a dead letter in again, as a new task, and drop the letter."""
    run_to_end(_retry(prepare("warning"), seq))


async def _retry(settings: Settings, seq: int) -> None:
    async with connected(settings) as bus:
        task_id = await admin.retry_letter(bus, seq)
    typer.echo(f"letter {seq} handed in again as task {task_id}")


@app.command()
def drop(seq: LetterSeq) -> None:
    """Erase a dead letter; its task has ended long since."""
    run_to_end(_drop(prepare("warning"), seq))


async def _drop(settings: Settings, seq: int) -> None:
    async with connected(settings) as bus:
        await admin.delete_letter(bus, seq)
    typer.echo(f"letter {seq} dropped")
