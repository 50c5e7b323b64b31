"""Phases and nodes in a background thread, for commands that run in this process."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from loom.agents.host.slots import Node
from loom.bus.bus import Bus
from loom.runner.services import running_nodes
from support.services import running_phases

WITHIN_S = 20
T = TypeVar("T")


class Cluster:
    """A running cluster; `do` awaits something on its loop, with `bus` a client's connection."""

    def __init__(self, url: str, namespace: str, loop: asyncio.AbstractEventLoop) -> None:
        self.url, self.namespace = url, namespace
        self.bus = Bus(url, namespace=namespace)
        self._loop = loop

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(WITHIN_S)


@contextmanager
def background_cluster(url: str, namespace: str, nodes: Sequence[Node]) -> Iterator[Cluster]:
    """Run the six phases and `nodes` while the body runs."""
    loop = asyncio.new_event_loop()
    cluster = Cluster(url, namespace, loop)
    ready, over = threading.Event(), asyncio.Event()

    async def run() -> None:
        async with (
            running_phases(url, namespace=namespace),
            running_nodes(url, lambda: nodes, namespace=namespace),
            cluster.bus,
        ):
            ready.set()
            await over.wait()

    def work() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(run())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert ready.wait(WITHIN_S)
        yield cluster
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(WITHIN_S)
