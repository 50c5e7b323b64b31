"""Fault scenarios, each in a namespace with a process that stops at one point, run concurrently."""

import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from itertools import product
from typing import Any, Protocol

from loom.runner.server.nats_server import NatsServer


class Scenario(AbstractAsyncContextManager[Any], Protocol):
    """A namespace in which one process is killed or stopped."""

    async def inject(self) -> None:
        """Start the work, and return once the fault has happened."""

    async def verify(self) -> None:
        """Replace the process, and check that nothing is lost."""


def scenarios(
    kind: Callable[..., Scenario],
    crashes: Sequence[Any],
    url: str,
    namespace: str,
    *,
    signals: Sequence[signal.Signals] = (signal.SIGKILL, signal.SIGSTOP),
    durable: bool = False,
) -> list[Scenario]:
    """Return one scenario for each pair of a crash and a signal."""
    cases = enumerate(product(crashes, signals))
    return [kind(url, f"{namespace}-{n}", crash, how, durable=durable) for n, (crash, how) in cases]


async def run_all(scenarios: Sequence[Scenario], server: NatsServer | None = None) -> None:
    """Run scenarios concurrently; with `server`, restart that server between the faults and the checks."""
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(scenario) for scenario in scenarios))
        await asyncio.gather(*(scenario.inject() for scenario in scenarios))
        if server is not None:
            server.kill()
            await asyncio.to_thread(server.restart)
        await asyncio.gather(*(scenario.verify() for scenario in scenarios))
