"""The opening and closing of a Runtime: sessions on the bus, and a background thread for synchronous code."""

import asyncio
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from loom.background_loop import BackgroundLoop
from loom.bus.natsio.loop_ownership import running_loop
from loom.compat.reward_formulas import RewardBus
from loom.runner.session import Inheritance, Session
from loom.runner.session_owner import SessionOwner
from loom.runner.settings import Settings
from loom.schemas.errors import LoomError
from loom.schemas.task import TaskAd


class OpenRuntime:
    """Base of Runtime: `async with`, `with`, `aclose` and `dispose`.

    Args:
        make_session: Makes a session; in a forked child its argument is the inheritance from the parent.
        settings: Those of the environment; its `nats_url` decides whether the server outlives the Runtime.
        reward_bus: Its `bus` is set while a session is open.
    """

    def __init__(
        self, make_session: Callable[[Inheritance | None], Session], settings: Settings, reward_bus: RewardBus
    ) -> None:
        self.reward_bus = reward_bus
        self._settings = settings
        self._closed = False
        """Whether it was closed on purpose, so that only a `with` opens it again."""
        self._sessions = SessionOwner(make_session)
        self._background = BackgroundLoop(at_exit=self.dispose)

    async def __aenter__(self) -> Self:
        self._closed = False
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self._settings.nats_url:
            self.dispose()  # the embedded server stops as well, so draining would be useless
        await self.aclose()

    def __enter__(self) -> Self:
        if running_loop() is not None:
            raise LoomError("`with` would block the event loop of this thread; use `async with`")
        try:
            self._in_background(self.__aenter__())
        except BaseException:
            self.dispose()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._in_background(self.__aexit__(kind, error, trace))
        finally:
            self.dispose()

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run `work` in the event loop of the open Runtime, or in that of a background thread."""
        try:
            loop = self._loop_for_sync()
        except BaseException:
            work.close()
            raise
        asyncio.run_coroutine_threadsafe(work, loop).result()

    async def aclose(self) -> None:
        """Finish running work and close everything; safe to call twice.

        Raises:
            WrongEventLoop: The Runtime is open in another event loop.
        """
        await self._sessions.aclose()
        self._closed = True
        self.reward_bus.bus = None

    def dispose(self) -> None:
        """Close everything at once without waiting for running work; from any thread, safe to call twice."""
        self._closed = True
        self.reward_bus.bus = None
        self._sessions.abort()
        self._background.close()

    async def _open(self, task: TaskAd | None = None) -> Session:
        """Return the open session; the node to which `task` is pinned is announced."""
        self._check_closed()
        session = await self._sessions.open()
        self.reward_bus.bus = session.bus
        if task is not None:
            await session.announce(task.node_id)
        return session

    def _check_closed(self) -> None:
        if self._closed:
            raise LoomError("the Runtime is closed; open it again with `async with` or `with`, or make another one")

    def _loop_for_sync(self) -> asyncio.AbstractEventLoop:
        if running_loop() is not None:
            raise LoomError("submit_sync would block the event loop of this thread; use `await rt.submit(…)`")
        owner = self._sessions.owner
        if owner is None:
            return self._background.loop()
        if not owner.loop.is_running():
            raise owner.refusal()
        return owner.loop
