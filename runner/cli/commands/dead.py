"""`loom dead ls`, `show`, `retry` and `rm`."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loom.bus.bus import Bus
from loom.bus.dead_letters import admin
from loom.bus.dead_letters.admin import Letter, UnknownLetter
from loom.runner.cli.command_groups import command_group
from loom.runner.cli.common import MANY, AsLines, add_row, clock, connected, print_json
from loom.runner.cli.entry import prepare, run_to_end
from loom.runner.cli.views.tables import console, one_line, printable, short, table_of
from loom.runner.settings import Settings
from loom.schemas.base import encode
from loom.schemas.envelope import PHASES
from loom.schemas.errors import LoomError

BODY_LINES = 200
"""Most lines of a JSON body that are printed."""
BODY_BYTES = 2048
"""Most bytes of any other body that are printed."""
MOST = 1_000_000
"""More dead letters than a stream of 256 MiB holds."""
CODES = {
    "undecodable": ("undecodable: ", "a stored value is undecodable: "),
    "unsettled": ("delivered ",),
    "scheduled": ("scheduled by ",),
    "incomplete": ("the envelope came without ",),
}
"""Code of a letter -> how its reason begins; every other reason has the code `other`."""
EXAMPLES = """
    loom dead ls --phase execute
    loom dead show 7
    loom dead retry --all --code unsettled
    loom dead rm 7 8
"""


Sequences = Annotated[
    list[int] | None,
    typer.Argument(metavar="[SEQ]...", min=1, help="Numbers of letters, as `loom dead ls` prints them."),
]
All = Annotated[bool, typer.Option("--all", help="All letters that --phase and --code select.")]
PhaseName = Annotated[str | None, typer.Option("--phase", metavar="|".join(PHASES), help="Only letters of this phase.")]
Code = Annotated[
    str | None,
    typer.Option("--code", metavar="|".join((*CODES, "other")), help="Only letters with this kind of reason."),
]


class LetterFilter(NamedTuple):
    """Selects letters by phase and code; None selects all."""

    phase: str | None
    code: str | None

    def matches(self, letter: Letter) -> bool:
        """Return whether the letter has the phase and the code."""
        return (self.phase is None or letter.facts.phase == self.phase) and (
            self.code is None or code_of(letter) == self.code
        )


def code_of(letter: Letter) -> str:
    """Return the kind of a letter's reason: a key of CODES, or `other`."""
    return next((code for code, begins in CODES.items() if letter.facts.reason.startswith(begins)), "other")


def _filter_of(phase: str | None, code: str | None) -> LetterFilter:
    if phase is not None and phase not in PHASES:
        raise typer.BadParameter(f"{phase!r} is not one of {', '.join(PHASES)}", param_hint="--phase")
    if code is not None and code not in {*CODES, "other"}:
        raise typer.BadParameter(f"{code!r} is not one of {', '.join(CODES)}, other", param_hint="--code")
    return LetterFilter(phase, code)


def _check_selection(seqs: Sequence[int], wanted: LetterFilter, *, is_all: bool) -> None:
    """Refuse a command line that names letters and selects them as well, or does neither."""
    if bool(seqs) == is_all:
        raise typer.BadParameter("give the numbers of letters, or --all", param_hint="SEQ")
    if not is_all and wanted != (None, None):
        raise typer.BadParameter("--phase and --code need --all", param_hint="--phase")


async def _selected(bus: Bus, seqs: Sequence[int], wanted: LetterFilter) -> list[Letter]:
    """Return the letters with these numbers, or, without numbers, all that the filter selects; oldest first.

    Raises:
        UnknownLetter: A number has no letter.
    """
    if seqs:
        return [await admin.get_letter(bus, seq) for seq in dict.fromkeys(seqs)]
    return [letter for letter in await admin.list_letters(bus, MOST) if wanted.matches(letter)]


def ls(
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Most letters to list.")] = MANY,
    is_all: Annotated[bool, typer.Option("--all", help="List all letters, whatever --limit is.")] = False,
    phase: PhaseName = None,
    code: Code = None,
    as_json: AsLines = False,
) -> None:
    """List the latest dead letters, the newest last."""
    run_to_end(_ls(prepare("warning"), MOST if is_all else limit, _filter_of(phase, code), as_json=as_json))


async def _ls(settings: Settings, limit: int, wanted: LetterFilter, *, as_json: bool) -> None:
    async with connected(settings) as bus:
        if wanted == (None, None):
            letters = await admin.list_letters(bus, limit)
        else:
            letters = (await _selected(bus, (), wanted))[-limit:]
    if as_json:
        for letter in letters:
            print_json(as_object(letter))
        return
    console().print(_table(letters) if letters else "no dead letters")


def _table(letters: Sequence[Letter]) -> Table:
    numbers = ("letter", "tries", "bytes")
    columns = ("letter", "at", "phase", "task", "tries", "bytes", "reason")
    table = table_of(columns, right=numbers, ratios={"reason": 1})
    for letter in letters:
        facts = letter.facts
        counts = (str(facts.deliveries), f"{len(letter.body)}{'+' if facts.cut else ''}")
        about = (one_line(facts.phase, 16), short(one_line(facts.task_id, 64)))
        add_row(table, str(letter.seq), clock(letter.stored_at), *about, *counts, one_line(facts.reason, 200))
    return table


def show(
    seqs: Sequences = None,
    is_all: All = False,
    phase: PhaseName = None,
    code: Code = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; the raw bytes are in base64.")] = False,
) -> None:
    """Show dead letters: their metadata, their hop trail and their content."""
    wanted = _filter_of(phase, code)
    _check_selection(seqs or (), wanted, is_all=is_all)
    run_to_end(_show(prepare("warning"), seqs or (), wanted, as_json=as_json))


async def _show(settings: Settings, seqs: Sequence[int], wanted: LetterFilter, *, as_json: bool) -> None:
    async with connected(settings) as bus:
        letters = await _selected(bus, seqs, wanted)
    screen = console()
    for index, letter in enumerate(letters):
        if as_json:
            print_json({**as_object(letter), "message": _as_json(letter.body), "raw": letter.body})
            continue
        if index:
            screen.print()
        for name, text in _facts(letter):
            screen.print(Text.assemble((f"{name:<9}", "dim"), one_line(text)))
        screen.print()
        _show_body(screen, letter)


def _facts(letter: Letter) -> Sequence[tuple[str, str]]:
    facts = letter.facts
    times = "delivery" if facts.deliveries == 1 else "deliveries"
    known = facts.trail or facts.phase == "sense"  # where every trail begins
    return (
        ("letter", f"{letter.seq}, of {clock(letter.stored_at)}"),
        ("task", facts.task_id),
        ("reason", facts.reason),
        ("phase", f"{facts.phase}, after {facts.deliveries} {times}"),
        ("trail", " → ".join((*facts.trail.split(), facts.phase)) if known else "not known"),
        ("subject", f"{facts.subject}, sequence {facts.stream_seq}"),
        ("size", f"{len(letter.body)} bytes{' are left of more' if facts.cut else ''}"),
    )


def _show_body(screen: Console, letter: Letter) -> None:
    document = _as_json(letter.body)
    if document is None:
        more = len(letter.body) - BODY_BYTES
        screen.print(Text(escaped(letter.body[:BODY_BYTES])))
        if more > 0:
            screen.print(Text(f"… and {more} more bytes; --json has them", "dim"))
        return
    lines = printable(msgspec.json.format(bytes(document), indent=2).decode()).splitlines()
    screen.print(Text("\n".join(lines[:BODY_LINES])))
    if len(lines) > BODY_LINES:
        screen.print(Text(f"… and {len(lines) - BODY_LINES} more lines; --json has them", "dim"))


def as_object(letter: Letter) -> dict[str, Any]:
    """Return the metadata of a letter as free JSON."""
    facts = msgspec.to_builtins(letter.facts)
    head = {"seq": letter.seq, "at": letter.stored_at, "size": len(letter.body), "code": code_of(letter)}
    return {**head, **facts}


def _as_json(body: bytes) -> msgspec.Raw | None:
    """Return `body` on one line, with its numbers as they are, or None where it is not JSON."""
    try:
        encode(msgspec.json.decode(body))  # what cannot be encoded again is shown as bytes
        return msgspec.Raw(msgspec.json.format(body, indent=-1))
    except (ValueError, RecursionError):
        return None


def escaped(raw: bytes) -> str:
    r"""Return `raw` as printable text: `\xff` for bytes that are not UTF-8, `\x1b` for control characters."""
    text = raw.decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def retry(seqs: Sequences = None, is_all: All = False, phase: PhaseName = None, code: Code = None) -> None:
    """Submit the tasks of dead letters again, as new tasks, and remove the letters."""
    _for_each(_retry, seqs or (), _filter_of(phase, code), is_all=is_all)


async def _retry(bus: Bus, seq: int) -> str:
    return f"letter {seq} submitted again as task {await admin.retry_letter(bus, seq)}"


def rm(seqs: Sequences = None, is_all: All = False, phase: PhaseName = None, code: Code = None) -> None:
    """Remove dead letters. Their tasks have ended."""
    _for_each(_remove, seqs or (), _filter_of(phase, code), is_all=is_all)


async def _remove(bus: Bus, seq: int) -> str:
    await admin.delete_letter(bus, seq)
    return f"letter {seq} removed"


def _for_each(
    act: Callable[[Bus, int], Awaitable[str]], seqs: Sequence[int], wanted: LetterFilter, *, is_all: bool
) -> None:
    _check_selection(seqs, wanted, is_all=is_all)
    if not run_to_end(_act(prepare("warning"), act, seqs, wanted)):
        raise typer.Exit(1)


async def _act(
    settings: Settings, act: Callable[[Bus, int], Awaitable[str]], seqs: Sequence[int], wanted: LetterFilter
) -> bool:
    """Act on every letter and print what was done; with --all a failure is printed, and the others follow.

    Returns:
        Whether all of it succeeded.
    """
    succeeded = True
    async with connected(settings) as bus:
        if seqs:
            for seq in dict.fromkeys(seqs):
                typer.echo(await act(bus, seq))
            return True
        letters = await _selected(bus, (), wanted)
        for letter in letters:
            try:
                typer.echo(await act(bus, letter.seq))
            except UnknownLetter:
                continue  # another operator was faster
            except LoomError as error:
                typer.echo(f"{error.code}: {one_line(error.message)}", err=True)
                succeeded = False
    if not letters:
        typer.echo("no dead letters")
    return succeeded


app = command_group("List, show, retry and remove messages that could not be handled.", EXAMPLES, ls, show, retry, rm)
