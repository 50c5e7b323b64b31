"""What does work and ends: `loom run`, `loom submit`."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import msgspec
import typer

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.tap import Tap
from loom.bus.task_client import TaskHandle
from loom.runner.cli.common import client_bus
from loom.runner.cli.entry import prepare, run_to_end, sense_model, unless_lost
from loom.runner.cli.file_lifespan import entered
from loom.runner.cli.input_files import InvalidFile, NodeFile, load_node_file, load_tasks
from loom.runner.cli.label_option import LabelPairs, labels_of
from loom.runner.cli.process_exit import EXTRA_S
from loom.runner.cli.views.answer_stream import Transcript
from loom.runner.cli.views.run_progress import Progress
from loom.runner.cli.views.run_state import FAMILIES, RunState
from loom.runner.cli.views.tables import closing, console, one_line, show
from loom.runner.session import Session, check_phases
from loom.runner.settings import Settings
from loom.schemas.base import decode, encode
from loom.schemas.errors import BusUnavailable, InvalidTask, LoomError
from loom.schemas.events import StepStart, TextDelta
from loom.schemas.task import Accepted, TaskAd, TaskError, TaskResult, parse_ad

STDOUT = "-"
AT_ONCE = 16
MOST_WARNINGS = 20
"""Different warnings a run prints; the file of results has all of them."""
ACCEPT_S = 6.0
"""A little longer than SENSE tries to have a submission stored."""


# -- loom run


def run(
    file: Annotated[Path, typer.Argument(metavar="TASKS.jsonl", help="Tasks, one JSON object a line.")],
    agents: Annotated[
        Path | None,
        typer.Option(metavar="FILE.py", help="Python file that defines `nodes`; with NATS_URL set it may be left out."),
    ] = None,
    out: Annotated[str, typer.Option(help="File of results, one JSON object a line; - is stdout.")] = "results.jsonl",
    at_once: Annotated[int, typer.Option(min=1, help="Tasks handed in at a time.")] = AT_ONCE,
) -> None:
    """Do the tasks of a file, here or on the server of NATS_URL, and show how it went."""
    settings = prepare("warning")
    ads = load_tasks(file)
    if agents is None and not settings.nats_url:
        raise typer.BadParameter("needed, unless NATS_URL leads to a cluster with agents", param_hint="--agents")
    if out != STDOUT and Path(out).resolve() == file.resolve():
        raise typer.BadParameter("is the file of the tasks", param_hint="--out")
    loaded = load_node_file(agents) if agents else NodeFile(Path(), [])
    with output(out) as lines:
        limit_s = 2 * settings.cluster.drain_timeout_s + loaded.close_s + EXTRA_S if loaded.nodes else None
        results = run_to_end(_run(settings, ads, loaded, lines, at_once), limit_s=limit_s)
    if not all(result.success for result in results):
        raise typer.Exit(1)


async def _run(
    settings: Settings, ads: Sequence[TaskAd], loaded: NodeFile, lines: TextIO, at_once: int
) -> list[TaskResult]:
    board = RunState(ads)
    screen = console(stderr=lines is sys.stdout)
    done: dict[str, TaskResult] = {}
    session = Session(lambda: loaded.nodes, settings, llm=sense_model(settings))
    started = time.monotonic()
    async with entered(loaded.lifespan, loaded.path), contextlib.aclosing(session):
        await session.open()
        try:
            with Progress(board, screen) as progress:
                await _work_through(session.bus, board, progress, done, at_once, settings.cluster.learn_wait_s)
        finally:  # an interrupted run keeps what it has, however long its agents hold up the end
            results = [done[ad.task_id] for ad in ads if ad.task_id in done]
            lines.writelines(encode(result).decode() + "\n" for result in results)
            lines.flush()
    show(screen, closing(board, results))
    where = "" if lines is sys.stdout else f"; results in {lines.name}"
    counts = counted(results, len(ads))
    screen.print(f"\n{counts} in {time.monotonic() - started:.1f} s{where}", soft_wrap=True)
    for warning in list(dict.fromkeys(warning for result in results for warning in result.warnings))[:MOST_WARNINGS]:
        typer.echo(f"warning: {one_line(warning)}", err=True)
    return results


def counted(results: Sequence[TaskResult], tasks: int) -> str:
    """Return how many of a run's tasks succeeded, and how many of these with less than was asked, in words."""
    best_effort = sum(result.success and result.below_threshold for result in results)
    less = f" ({best_effort} with the best of refused answers)" if best_effort else ""
    return f"{sum(result.success for result in results)} of {tasks} succeeded{less}"


async def _work_through(
    bus: Bus, board: RunState, progress: Progress, done: dict[str, TaskResult], at_once: int, learn_wait_s: float
) -> None:
    """Do all tasks, then wait a little for what is learned from them, while the tap shows how far they are.

    A named submitter has no right to the traffic, and sees only what came of its tasks.
    """
    if bus.by_name:
        await unless_lost(bus, _do_all(bus, board, progress, done, at_once))
        return
    async with Tap(bus, FAMILIES) as tap:
        following = bus.tasks.spawn(_follow(tap, board, progress), name="progress")
        try:
            await unless_lost(bus, _do_all(bus, board, progress, done, at_once))
        finally:
            following.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(learn_wait_s):
                while not board.learned:
                    board.see(await anext(tap))


async def _follow(tap: Tap, board: RunState, progress: Progress) -> None:
    async for seen in tap:
        progress.changed(board.see(seen))


async def _do_all(bus: Bus, board: RunState, progress: Progress, done: dict[str, TaskResult], at_once: int) -> None:
    gate = asyncio.Semaphore(at_once)

    async def do(ad: TaskAd) -> None:
        async with gate:
            result = await _answer(bus, ad)
        done[ad.task_id] = result
        progress.changed(board.end(result))

    working = [asyncio.ensure_future(do(row.ad)) for row in board.rows.values()]
    try:
        await asyncio.gather(*working)
    finally:
        for each in working:
            each.cancel()
        await asyncio.gather(*working, return_exceptions=True)


async def _answer(bus: Bus, ad: TaskAd) -> TaskResult:
    """Return the task's result; a refusal to take it is one, too."""
    try:
        async with _handed_in(bus, ad, deltas=False) as handle:
            return await handle.result()
    except BusUnavailable:
        raise  # no word about the task: the run cannot go on
    except LoomError as error:
        return TaskResult(
            task_id=ad.task_id, state="failed", error=TaskError.of(error), domain=ad.domain, labels=ad.labels
        )


def _handed_in(bus: Bus, ad: TaskAd, *, deltas: bool) -> contextlib.AbstractAsyncContextManager[TaskHandle]:
    """Publish a task that is cancelled when the command is interrupted."""

    def report(result: TaskResult) -> None:
        typer.echo(f"interrupted: {ad.task_id} {result.state}", err=True)

    return task_client.published(bus, ad, deltas=deltas, cancel_with_caller=True, cancelled=report)


@contextlib.contextmanager
def output(name: str) -> Iterator[TextIO]:
    """Open the file of results before anything runs.

    Raises:
        InvalidFile: It cannot be written.
    """
    if name == STDOUT:
        yield sys.stdout
        return
    try:
        file = Path(name).open("w", encoding="utf-8")  # noqa: SIM115 - closed below; only opening it is guarded
    except OSError as error:
        raise InvalidFile(f"{name}: {error.strerror}") from error
    with file:
        yield file


# -- loom submit


def submit(
    description: Annotated[str, typer.Argument(help="The work, in words.")],
    domain: Annotated[str, typer.Option(help="Field of knowledge; without it SENSE decides.")] = "",
    priority: Annotated[str, typer.Option(metavar="low|normal|high|critical", help="How urgent it is.")] = "normal",
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Time to the deadline; 300 if absent.")
    ] = None,
    node: Annotated[str | None, typer.Option(metavar="ID", help="Only this node may do it; no auction.")] = None,
    tool: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A tool the node must have; repeatable.")
    ] = None,
    label: LabelPairs = None,
    context: Annotated[str, typer.Option(metavar="JSON", help="An object handed to the agent.")] = "{}",
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Print the task's id and do not wait.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")] = False,
) -> None:
    """Hand in one task, show its answer as it is written, and print its result."""
    settings = prepare("warning")
    given: dict[str, Any] = {
        "description": description,
        "domain": domain,
        "priority": priority,
        "timeout_s": timeout,
        "node_id": node,
        "required_tools": tool,
        "labels": labels_of(label),
        "context": _context(context),
        "wait": not no_wait,
    }
    ad = parse_ad(encode({name: value for name, value in given.items() if value is not None}))
    result = run_to_end(_submit(settings, ad, as_json=as_json))
    if result is not None and result.error is not None:
        raise result.error.to_exception(ad.task_id)


async def _submit(settings: Settings, ad: TaskAd, *, as_json: bool) -> TaskResult | None:
    """Print what came of `ad` and return it; None when nobody waits for it."""
    async with client_bus(settings) as bus:
        await check_phases(bus)
        if not ad.wait:
            answer = await task_client.request(bus, task_client.request_subject(bus, "submit"), ad, timeout_s=ACCEPT_S)
            accepted = decode(answer, Accepted)
            typer.echo(encode(accepted) if as_json else accepted.task_id)
            return None
        live = sys.stdout.isatty() and not as_json
        result = await unless_lost(bus, _written(bus, ad) if live else _answer(bus, ad))
    if as_json:
        typer.echo(encode(result))
    elif not live and result.success:
        typer.echo(result.content)
    for note in () if as_json else notes_on(result):
        typer.echo(note, err=True)
    return result


def notes_on(result: TaskResult) -> Iterator[str]:
    """Yield what a person should know of a result besides its answer or error, a line each."""
    for warning in result.warnings:
        yield f"warning: {one_line(warning)}"
    if result.truncated:
        yield "truncated: the answer was longer than a message may carry, and has been cut"
    if result.below_threshold:
        yield "below threshold: no answer met what the task accepts; this is the best of those refused"
    best = result.error.best_rejected if result.error is not None else None
    if best is not None:
        yield f"a refused answer of {best.node_id} is kept: `loom task {result.task_id}` shows it, --json has all of it"


async def _written(bus: Bus, ad: TaskAd) -> TaskResult:
    """Return the task's result, its answer printed piece by piece while it is written."""
    transcript = Transcript()
    try:
        async with _handed_in(bus, ad, deltas=True) as handle:
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


def _context(text: str) -> Any:
    """The JSON of `--context`; that it is an object is for the ad to check."""
    try:
        return msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise InvalidTask(f"context is not JSON: {error}", field="context") from error
