"""The event loop and the process that asyncio objects belong to, and what a forked child does with inherited ones."""

import asyncio
import ctypes
import os
import selectors
from typing import Any, Final
from weakref import WeakSet

from loom.schemas.errors import LoomError

THREADSAFE: Final = "asyncio.run_coroutine_threadsafe(…, loop)"


class WrongEventLoop(LoomError):
    """A call came from an event loop or a process that the object does not belong to; the call changed nothing."""

    code = "wrong_event_loop"


class Owner:
    """The event loop that runs now, and this process.

    Args:
        what: The owned object, for messages: `Runtime`, `connection`, …
        ways: What a caller in another event loop can do, for messages.
    """

    def __init__(self, what: str, ways: str = f"{THREADSAFE}, or a Runtime of its own") -> None:
        self.loop = asyncio.get_running_loop()
        _loops.add(self.loop)
        self._pid = os.getpid()
        self._what = what
        self._ways = ways

    @property
    def inherited(self) -> bool:
        """Whether a parent process owned the object before a fork."""
        return self._pid != os.getpid()

    @property
    def lives(self) -> bool:
        """Whether the loop can still run in this process."""
        return not self.inherited and not self.loop.is_closed()

    def check(self) -> None:
        """Return if the caller runs in the owner's loop.

        Raises:
            WrongEventLoop: It runs in another loop, in none, or in a forked child.
        """
        if running_loop() is not self.loop or self.inherited:
            raise self.refusal()

    def refusal(self) -> WrongEventLoop:
        """Return the error for a caller outside the owner's loop."""
        if self.inherited:
            return WrongEventLoop(f"this {self._what} was opened by the parent process; open one in this process")
        if self.loop.is_closed():
            return WrongEventLoop(f"this {self._what} was opened in an event loop that has ended; open a new one")
        return WrongEventLoop(f"this {self._what} is open in another event loop; use {self._ways}")


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs in this thread; None when there is none."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def keep_forever(inherited: Any) -> None:
    """Exempt an object from destruction, in a forked child.

    A destroyed transport removes its socket from the epoll set, which parent and child share: the parent would not
    be woken by that socket again. The child's exit closes its descriptors, and the parent's stay open.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


_loops: WeakSet[asyncio.AbstractEventLoop] = WeakSet()


def _detach_loops() -> None:
    """Give inherited event loops a selector of their own, and stop those that run.

    A fork in the thread of a loop leaves the child inside that loop. With the parent's selector it would read what
    the parent's sockets receive, and its cleanup would unregister them. A loop of uvloop keeps what it has.
    """
    for loop in list(_loops):
        if isinstance(loop, asyncio.SelectorEventLoop) and not loop.is_closed():
            inner: Any = loop
            keep_forever((inner._selector, inner._ssock, inner._csock))
            inner._selector = selectors.DefaultSelector()
            inner._make_self_pipe()
            if loop.is_running():
                loop.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_detach_loops)
