"""Namespaces in each of which one process dies at a point of its own, gone through side by side."""

import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from itertools import product
from typing import Any, Protocol

from loom.runner.server.nats_server import NatsServer


class Town(AbstractAsyncContextManager[Any], Protocol):
    """A namespace with something that will die or stop in it."""

    async def strike(self) -> None:
        """Return once it has."""

    async def recover(self) -> None:
        """Replace it, and check that nothing is lost."""


def towns(
    kind: Callable[..., Town],
    crashes: Sequence[Any],
    url: str,
    namespace: str,
    *,
    ways: Sequence[signal.Signals] = (signal.SIGKILL, signal.SIGSTOP),
    durable: bool = False,
) -> list[Town]:
    """Return a town of that kind for each crash and each way to bring it about."""
    cases = enumerate(product(crashes, ways))
    return [kind(url, f"{namespace}-{n}", crash, how, durable=durable) for n, (crash, how) in cases]


async def survive(towns: Sequence[Town], server: NatsServer | None = None) -> None:
    """Let all of it happen at once; with `server`, kill and restart that before anybody recovers."""
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(town) for town in towns))
        await asyncio.gather(*(town.strike() for town in towns))
        if server is not None:
            server.kill()
            await asyncio.to_thread(server.restart)
        await asyncio.gather(*(town.recover() for town in towns))
