"""`loom submit`."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.runner.cli.common import client_bus
from loom.runner.cli.entry import prepare, run_to_end, unless_lost
from loom.runner.cli.input_files import read_file
from loom.runner.cli.label_option import LabelPairs, labels_of
from loom.runner.cli.task_submission import result_of, submitted
from loom.runner.cli.views.answer_stream import Transcript
from loom.runner.cli.views.tables import one_line
from loom.runner.session import check_phases
from loom.runner.settings import Settings
from loom.schemas.base import decode, encode
from loom.schemas.checks.ad import parse_ad
from loom.schemas.errors import InvalidTask
from loom.schemas.events import StepStart, TextDelta
from loom.schemas.task import Accepted, TaskAd, TaskResult

ACCEPT_S = 6.0
"""A little longer than SENSE tries to store a submission."""
STDIN = "-"
EXAMPLES = """
    loom submit "Summarise the attached notes" --domain writing
    loom submit "Which year?" --accept '{"pattern": "^[0-9]{4}$"}' --budget 2000
    cat notes.txt | loom submit - --no-wait
    loom submit --ad task.json --task-id nightly-1
"""

AdFile = Annotated[
    str | None,
    typer.Option("--ad", metavar="FILE", help="JSON file with a task ad; - is stdin. Options override its fields."),
]
TaskIdOption = Annotated[
    str | None, typer.Option("--task-id", metavar="ID", help="Id of the task; submitting it again is safe.")
]


def submit(
    description: Annotated[
        str | None, typer.Argument(metavar="DESCRIPTION", help="The work, in words; - reads it from stdin.")
    ] = None,
    ad: AdFile = None,
    task_id: TaskIdOption = None,
    domain: Annotated[str | None, typer.Option(help="Field of knowledge; without it SENSE decides.")] = None,
    priority: Annotated[
        str | None, typer.Option(metavar="low|normal|high|critical", help="Urgency; normal if absent.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Time to the deadline; 300 if absent.")
    ] = None,
    node: Annotated[str | None, typer.Option(metavar="ID", help="Run on this node, without an auction.")] = None,
    tool: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A tool the node must have; repeatable.")
    ] = None,
    accept: Annotated[
        str | None, typer.Option(metavar="JSON", help='What an answer must satisfy, such as {"contains": ["yes"]}.')
    ] = None,
    budget: Annotated[int | None, typer.Option(metavar="TOKENS", help="Most tokens the task may use.")] = None,
    label: LabelPairs = None,
    context: Annotated[str | None, typer.Option(metavar="JSON", help="An object that is passed to the agent.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the id of the task and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")] = False,
) -> None:
    """Submit one task, stream its answer on a terminal, and print its result."""
    settings = prepare("warning")
    if ad == STDIN and description == STDIN:
        raise typer.BadParameter("stdin cannot be both the description and --ad", param_hint="--ad")
    options: dict[str, Any] = {
        "task_id": task_id,
        "description": _read_stdin() if description == STDIN else description,
        "domain": domain,
        "priority": priority,
        "timeout_s": timeout,
        "node_id": node,
        "required_tools": tool,
        "accept": _json_of("accept", accept),
        "token_budget": budget,
        "labels": labels_of(label) or None,
        "context": _json_of("context", context),
        "wait": False if no_wait else None,
    }
    task = _ad_of(ad, {name: value for name, value in options.items() if value is not None})
    result = run_to_end(_submit(settings, task, as_json=as_json))
    if result is not None and result.error is not None:
        raise result.error.to_exception(task.task_id)


def _ad_of(source: str | None, options: Mapping[str, Any]) -> TaskAd:
    """Return the ad of a file, if there is one, with the options in place of its fields.

    Raises:
        InvalidFile: The file cannot be read.
        InvalidTask: The ad breaks a rule.
        typer.BadParameter: There is neither a file nor a description.
    """
    if source is None:
        if "description" not in options:
            raise typer.BadParameter("give a description, - for stdin, or --ad FILE", param_hint="DESCRIPTION")
        return parse_ad(encode(options))
    raw = _read_stdin().encode() if source == STDIN else read_file(Path(source))
    fields = _json_of("ad", raw)
    if not isinstance(fields, dict):
        raise InvalidTask("ad is not a JSON object", field="ad")
    return parse_ad(encode({**fields, **options}))


def _read_stdin() -> str:
    return sys.stdin.read().strip()


def _json_of(field: str, text: str | bytes | None) -> Any:
    """Return `text` as JSON, None without it; its shape is checked with the ad.

    Raises:
        InvalidTask: It is not JSON.
    """
    if text is None:
        return None
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise InvalidTask(f"{field} is not JSON: {error}", field=field) from error


async def _submit(settings: Settings, ad: TaskAd, *, as_json: bool) -> TaskResult | None:
    """Print the result of a task and return it; None when the command does not wait for it."""
    async with client_bus(settings) as bus:
        await check_phases(bus)
        if not ad.wait:
            reply = await task_client.request(bus, task_client.request_subject(bus, "submit"), ad, timeout_s=ACCEPT_S)
            accepted = decode(reply, Accepted)
            typer.echo(encode(accepted) if as_json else accepted.task_id)
            return None
        live = sys.stdout.isatty() and not as_json
        result = await unless_lost(bus, _written(bus, ad) if live else result_of(bus, ad))
    if as_json:
        typer.echo(encode(result))
    elif not live and result.success:
        typer.echo(result.content)
    for note in () if as_json else notes_on(result):
        typer.echo(note, err=True)
    return result


def notes_on(result: TaskResult) -> Iterator[str]:
    """Yield a line for each thing a reader should know in addition to the answer or the error."""
    for warning in result.warnings:
        yield f"warning: {one_line(warning)}"
    if result.truncated:
        yield "truncated: the answer was longer than a message may carry, and has been cut"
    if result.below_threshold:
        yield "below threshold: no answer met what the task accepts; this is the best of those refused"
    best = result.error.best_rejected if result.error is not None else None
    if best is not None:
        command = f"loom task show {result.task_id}"
        yield f"a refused answer of {best.node_id} is kept: `{command}` shows it, --json has all of it"


async def _written(bus: Bus, ad: TaskAd) -> TaskResult:
    """Return the result of a task; its answer is printed while it is generated."""
    transcript = Transcript()
    try:
        async with submitted(bus, ad, deltas=True) as handle:
            async for delta in handle.events():
                if isinstance(delta.event, TextDelta):
                    transcript.add(delta.attempt, delta.event.text)
                elif isinstance(delta.event, StepStart):
                    transcript.break_line()
            result = await handle.result()
        transcript.close(result.content)
    finally:
        transcript.break_line()
    return result
