"""From a command to a running coroutine: settings, event loop, signals, and connections that are gone for good."""

import asyncio
import contextlib
import gc
import importlib
import importlib.util
import os
import signal
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from loom.agents.config import AgentConfig
from loom.agents.openai_provider import OpenAIProvider
from loom.bus.client import Bus
from loom.bus.log import get_logger
from loom.runner import logs
from loom.runner.settings import InvalidSetting, Settings, from_environment, warn_of_misspelt_settings
from loom.schemas.errors import BusUnavailable
from loom.schemas.llm import LLMProvider

log = get_logger()
T = TypeVar("T")

DEFAULT_URL = "nats://127.0.0.1:4222"
FOREVER_S = float("inf")
"""How patiently a service waits for its server."""


RARELY = (50_000, 20, 50)
"""When garbage is collected: a message leaves many small objects behind, and none that only a collection would find."""


def prepare(log_level: str) -> Settings:
    """Return the settings of this process, its logs set up; `log_level` rules unless LOOM_LOG_LEVEL does.

    Raises:
        InvalidSetting: An environment variable does not fit.
    """
    settings = from_environment()
    logs.configure(settings.loom_log_level or log_level)
    warn_of_misspelt_settings()
    return settings


def loop_factory(wanted: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the event loop: None for asyncio's own.

    Args:
        wanted: auto, uvloop or asyncio.

    Raises:
        InvalidSetting: uvloop is wanted and not installed.
    """
    if wanted == "asyncio":
        return None
    if importlib.util.find_spec("uvloop"):
        factory: Callable[[], asyncio.AbstractEventLoop] = importlib.import_module("uvloop").new_event_loop
        return factory
    if wanted == "uvloop":
        raise InvalidSetting(
            "LOOM_EVENT_LOOP: uvloop is not installed; install loom-nats[fast], or choose auto", field="LOOM_EVENT_LOOP"
        )
    return None


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns, on the loop of LOOM_EVENT_LOOP. SIGTERM cancels it, as Ctrl-C does.

    Raises:
        SystemExit: SIGTERM came, and `work` has ended of it.
    """

    async def until_terminated() -> T:
        loop, working = asyncio.get_running_loop(), asyncio.ensure_future(work)
        with contextlib.suppress(NotImplementedError):  # on Windows, where nobody sends it
            loop.add_signal_handler(signal.SIGTERM, working.cancel)
        return await working

    try:
        factory = loop_factory(from_environment().loom_event_loop)
    except InvalidSetting:
        work.close()
        raise
    gc.freeze()  # what has been imported stays
    gc.set_threshold(*RARELY)
    with asyncio.Runner(loop_factory=factory) as runner:
        threads = ThreadPoolExecutor(thread_name_prefix="loom")
        runner.get_loop().set_default_executor(threads)
        try:
            return runner.run(until_terminated())
        except asyncio.CancelledError:
            raise SystemExit(128 + signal.SIGTERM) from None
        finally:  # closing the loop waits for the threads of its executor, and one may be busy for long
            threads.shutdown(wait=False, cancel_futures=True)
            runner.get_loop().set_default_executor(ThreadPoolExecutor(max_workers=1))


def run_service(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` until SIGINT or SIGTERM cancels it, which is its normal end; a second signal hurries its drain."""

    async def until_signalled() -> None:
        loop = asyncio.get_running_loop()
        service = loop.create_task(work)

        def stop() -> None:
            service.cancel()
            log.info("stopping", hint="once more hurries it")

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        with contextlib.suppress(asyncio.CancelledError):
            await service

    run_to_end(until_signalled())


async def unless_lost(bus: Bus, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns.

    Raises:
        BusUnavailable: The connection was closed for good meanwhile: the process is to end, and be started again.
    """
    working = asyncio.ensure_future(work)
    losing = asyncio.ensure_future(bus.lost.wait())
    try:
        await asyncio.wait([working, losing], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise BusUnavailable("the connection to the server was closed for good")
    finally:
        losing.cancel()
        working.cancel()
        await asyncio.gather(working, losing, return_exceptions=True)


async def until_lost(bus: Bus) -> None:
    """Wait; a service that may go on for ever does so here.

    Raises:
        BusUnavailable: The connection was closed for good.
    """
    await bus.lost.wait()
    raise BusUnavailable("the connection to the server was closed for good")


def sense_model(settings: Settings) -> LLMProvider | None:
    """Return the model SENSE may ask; None where the environment gives no access to one."""
    if os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"):
        return OpenAIProvider(AgentConfig(model=settings.loom_model))
    return None
