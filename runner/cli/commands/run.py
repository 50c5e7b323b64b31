"""`loom run`."""

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, TextIO

import typer

from loom.bus.bus import Bus
from loom.bus.tap import Tap
from loom.runner.cli.entry import phase_model, prepare, run_to_end, unless_lost
from loom.runner.cli.file_lifespan import entered
from loom.runner.cli.input_files import InvalidFile, NodeFile, load_node_file, load_tasks
from loom.runner.cli.process_exit import EXTRA_S
from loom.runner.cli.task_submission import result_of
from loom.runner.cli.views.run_progress import Progress
from loom.runner.cli.views.run_state import FAMILIES, RunState
from loom.runner.cli.views.tables import closing, console, one_line, show
from loom.runner.session import Session
from loom.runner.settings import Settings
from loom.schemas.base import encode
from loom.schemas.task import TaskAd, TaskResult

STDOUT = "-"
AT_ONCE = 16
MOST_WARNINGS = 20
"""Most different warnings that are printed; the file of results has all of them."""
EXAMPLES = """
    loom run tasks.jsonl --agents agents.py
    NATS_URL=nats://db1:4222 loom run tasks.jsonl --out - --at-once 4
"""


def run(
    file: Annotated[Path, typer.Argument(metavar="TASKS.jsonl", help="Tasks, one JSON object a line.")],
    agents: Annotated[
        Path | None,
        typer.Option(metavar="FILE.py", help="Python file that defines `nodes`; optional with NATS_URL."),
    ] = None,
    out: Annotated[str, typer.Option(help="File of results, one JSON object a line; - is stdout.")] = "results.jsonl",
    at_once: Annotated[int, typer.Option(min=1, help="Tasks that are submitted at a time.")] = AT_ONCE,
) -> None:
    """Run the tasks of a file, here or on the server of NATS_URL, and show results and rewards."""
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
    session = Session(lambda: loaded.nodes, settings, llm=phase_model(settings))
    started = time.monotonic()
    async with entered(loaded.lifespan, loaded.path), contextlib.aclosing(session):
        await session.open()
        try:
            with Progress(board, screen) as progress:
                await _work_through(session.bus, board, progress, done, at_once, settings.cluster.learn_wait_s)
        finally:  # an interrupted run keeps its results, even when its agents end late
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
    """Return the counts of succeeded tasks, and of those with a refused answer, as a sentence."""
    best_effort = sum(result.success and result.below_threshold for result in results)
    less = f" ({best_effort} with the best of refused answers)" if best_effort else ""
    return f"{sum(result.success for result in results)} of {tasks} succeeded{less}"


async def _work_through(
    bus: Bus, board: RunState, progress: Progress, done: dict[str, TaskResult], at_once: int, learn_wait_s: float
) -> None:
    """Run all tasks, then wait a little until ADAPT has learned from them; a tap shows the progress.

    A named submitter has no right to the traffic and sees only its results.
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
            result = await result_of(bus, ad)
        done[ad.task_id] = result
        progress.changed(board.end(result))

    working = [asyncio.ensure_future(do(row.ad)) for row in board.rows.values()]
    try:
        await asyncio.gather(*working)
    finally:
        for each in working:
            each.cancel()
        await asyncio.gather(*working, return_exceptions=True)


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
