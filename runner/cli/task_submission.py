"""Submitting tasks from a command: the task is cancelled with the command."""

import contextlib

import typer

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.task_client import TaskHandle
from loom.schemas.errors import BusUnavailable, LoomError
from loom.schemas.task import TaskAd, TaskError, TaskResult


async def result_of(bus: Bus, ad: TaskAd) -> TaskResult:
    """Submit a task and return its result; a refused submission becomes a failed result.

    Raises:
        BusUnavailable: The state of the task cannot be known.
    """
    try:
        async with submitted(bus, ad, deltas=False) as handle:
            return await handle.result()
    except BusUnavailable:
        raise
    except LoomError as error:
        return TaskResult(
            task_id=ad.task_id, state="failed", error=TaskError.of(error), domain=ad.domain, labels=ad.labels
        )


def submitted(bus: Bus, ad: TaskAd, *, deltas: bool) -> contextlib.AbstractAsyncContextManager[TaskHandle]:
    """Return a context manager that submits a task and cancels it when the command is interrupted."""

    def report(result: TaskResult) -> None:
        typer.echo(f"interrupted: {ad.task_id} {result.state}", err=True)

    return task_client.published(bus, ad, deltas=deltas, cancel_with_caller=True, cancelled=report)
