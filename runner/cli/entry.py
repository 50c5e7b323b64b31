"""Runs the coroutine of a command: settings, event loop, signals, and lost connections."""

import asyncio
import contextlib
import gc
import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from loom.agents.llm.config import AgentConfig
from loom.agents.llm.openai.openai_provider import OpenAIProvider
from loom.bus.bus import Bus
from loom.bus.logs.log_fields import error_fields
from loom.bus.logs.logger import get_logger
from loom.runner import log_output
from loom.runner.cli.process_exit import StopSignals, tear_down
from loom.runner.settings import InvalidSetting, Settings, from_environment, warn_of_misspelt_settings
from loom.schemas.errors import LoomError
from loom.schemas.llm import LLMProvider

log = get_logger()
T = TypeVar("T")
LoopFactory = Callable[[], asyncio.AbstractEventLoop]

DEFAULT_URL = "nats://127.0.0.1:4222"
FOREVER_S = float("inf")
"""How long a service waits for its server: without limit."""


RARELY = (50_000, 20, 50)
"""Thresholds of the garbage collector: messages create many small objects, and almost none of them in cycles."""


def prepare(log_level: str) -> Settings:
    """Configure the logs and return the settings of this process; LOOM_LOG_LEVEL overrides `log_level`.

    Raises:
        InvalidSetting: The value of an environment variable is invalid.
    """
    settings = from_environment()
    log_output.configure(settings.loom_log_level or log_level)
    warn_of_misspelt_settings()
    return settings


def loop_factory(wanted: str) -> LoopFactory:
    """Return the function that creates the event loop.

    Args:
        wanted: auto, uvloop or asyncio.

    Raises:
        InvalidSetting: uvloop is requested and not installed.
    """
    if wanted != "asyncio" and importlib.util.find_spec("uvloop"):
        factory: LoopFactory = importlib.import_module("uvloop").new_event_loop
        return factory
    if wanted == "uvloop":
        raise InvalidSetting(
            "LOOM_EVENT_LOOP: uvloop is not installed: pip install uvloop, or choose auto", field="LOOM_EVENT_LOOP"
        )
    return asyncio.new_event_loop


def run_to_end(work: Coroutine[Any, Any, T], *, limit_s: float | None = None) -> T:
    """Run `work` on the loop of LOOM_EVENT_LOOP and return its result. SIGTERM and Ctrl-C cancel it.

    Args:
        limit_s: As of StopSignals, for work that runs user code.

    Raises:
        SystemExit: SIGTERM has cancelled `work`.
        KeyboardInterrupt: SIGINT has cancelled `work`.
    """
    new_loop = _chosen_loop(work)
    received: list[int] = []

    async def until_stopped() -> T:
        loop, working = asyncio.get_running_loop(), asyncio.ensure_future(work)
        with StopSignals(loop, working.cancel, limit_s=limit_s, last_words=_nothing) as signals:
            try:
                return await working
            finally:
                received.extend(signals.received)

    try:
        return _run(until_stopped(), new_loop)
    except asyncio.CancelledError:
        if received and received[0] == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + signal.SIGTERM) from None


def run_service(
    work: Coroutine[Any, Any, None],
    *,
    limit_s: float | None = None,
    last_words: Callable[[], None] | None = None,
    on_stop: Callable[[], str] | None = None,
) -> None:
    """Run `work` until SIGINT or SIGTERM cancels it, which is its normal end; a second signal hurries its drain.

    Args:
        limit_s: As of StopSignals, for work that runs user code.
        last_words: As of StopSignals.
        on_stop: As of StopSignals.
    """
    new_loop = _chosen_loop(work)

    async def until_signalled() -> None:
        loop = asyncio.get_running_loop()
        service = loop.create_task(work)
        signals = StopSignals(loop, service.cancel, limit_s=limit_s, last_words=last_words or _nothing, on_stop=on_stop)
        with signals, contextlib.suppress(asyncio.CancelledError):
            await service

    _run(until_signalled(), new_loop)


def _chosen_loop(work: Coroutine[Any, Any, Any]) -> LoopFactory:
    """Return the loop factory of LOOM_EVENT_LOOP; close `work` when the setting is refused."""
    try:
        return loop_factory(from_environment().loom_event_loop)
    except InvalidSetting:
        work.close()
        raise


def _run(main: Coroutine[Any, Any, T], new_loop: LoopFactory) -> T:
    """Run `main` to its end. Exceptions of user code in other tasks or callbacks end neither loop nor process."""
    gc.freeze()  # what has been imported stays
    gc.set_threshold(*RARELY)
    loop = new_loop()
    asyncio.set_event_loop(loop)
    loop.set_exception_handler(_log_fault)
    try:
        task = loop.create_task(main)
        while True:
            try:
                return loop.run_until_complete(task)
            except (KeyboardInterrupt, SystemExit) as error:
                if task.done():
                    raise
                log.error(
                    "exception_escaped", hint="raised in a task or a callback of user code", **error_fields(error)
                )
    finally:
        tear_down(loop)
        asyncio.set_event_loop(None)


def _log_fault(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log a report of asyncio without the texts of exceptions, which may hold secrets."""
    error = context.get("exception")
    log.error("task_failed", reason=context.get("message"), **(error_fields(error) if error is not None else {}))


def _nothing() -> None:
    """Do nothing."""


async def unless_lost(bus: Bus, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns.

    Raises:
        BusUnavailable: The connection was closed for good meanwhile: the process is to end, and be started again.
        ServiceFailed: An essential task has failed; the same follows.
    """
    working = asyncio.ensure_future(work)
    losing = asyncio.ensure_future(bus.tasks.lost.wait())
    try:
        await asyncio.wait([working, losing], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise bus.connection.loss()
    finally:
        losing.cancel()
        working.cancel()
        await asyncio.gather(working, losing, return_exceptions=True)


async def until_lost(bus: Bus) -> None:
    """Wait without limit while a service works.

    Raises:
        BusUnavailable: The connection was closed for good.
        ServiceFailed: An essential task has failed.
    """
    await bus.tasks.lost.wait()
    raise bus.connection.loss()


def report_ready(text: str) -> None:
    """Print `text` on a terminal; otherwise log its first line, so that all output of a service has one format."""
    if sys.stdout.isatty():
        print(text, flush=True)  # noqa: T201 - the command's output
    else:
        log.info("ready", message=text.partition("\n")[0])


def phase_model(settings: Settings) -> LLMProvider | None:
    """Return the model of the phases SENSE, SCALE and EVALUATE, or None.

    It is None without OPENAI_API_KEY and OPENAI_BASE_URL, and when the model cannot be used, which is logged.
    """
    if os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"):
        try:
            return OpenAIProvider(AgentConfig(model=settings.loom_model))
        except LoomError as error:
            log.warning("model_unusable", reason=error.message)
    return None
