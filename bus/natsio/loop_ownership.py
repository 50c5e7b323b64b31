"""Checks that asyncio objects are used in their event loop and process, and detaches them in forked children."""

import asyncio
import ctypes
import os
import selectors
from typing import Any, Final
from weakref import WeakSet

from loom.schemas.errors import LoomError

THREADSAFE: Final = "asyncio.run_coroutine_threadsafe(…, loop)"


class WrongEventLoop(LoomError):
    """An object was used outside its event loop or process; the call had no effect."""

    code = "wrong_event_loop"


class Owner:
    """The running event loop and the process, as the owner of an object.

    Args:
        what: Kind of the object, for error messages: `Runtime`, `connection`, …
        ways: What a caller in another event loop can do instead, for error messages.
    """

    def __init__(self, what: str, ways: str = f"{THREADSAFE}, or a Runtime of its own") -> None:
        self.loop = asyncio.get_running_loop()
        _loops.add(self.loop)
        self._pid = os.getpid()
        self._what = what
        self._ways = ways

    @property
    def inherited(self) -> bool:
        """Whether the object was created in a parent process, before a fork."""
        return self._pid != os.getpid()

    @property
    def lives(self) -> bool:
        """Whether the event loop can still run in this process."""
        return not self.inherited and not self.loop.is_closed()

    def check(self) -> None:
        """Check that the caller runs in the owner's event loop.

        Raises:
            WrongEventLoop: The caller runs in another event loop, in none, or in a forked child.
        """
        if running_loop() is not self.loop or self.inherited:
            raise self.refusal()

    def refusal(self) -> WrongEventLoop:
        """Return the error for a caller outside the owner's event loop."""
        if self.inherited:
            return WrongEventLoop(f"this {self._what} was opened by the parent process; open one in this process")
        if self.loop.is_closed():
            return WrongEventLoop(f"this {self._what} was opened in an event loop that has ended; open a new one")
        return WrongEventLoop(f"this {self._what} is open in another event loop; use {self._ways}")


def running_loop() -> asyncio.AbstractEventLoop | None:
    """Return the event loop that runs in this thread; None if none runs."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def keep_forever(inherited: Any) -> None:
    """Exempt an object from destruction, in a forked child.

    A destroyed transport removes its socket from the epoll set, which parent and child share. The parent would not
    be woken by that socket again. The exit of the child closes only the child's descriptors.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


_loops: WeakSet[asyncio.AbstractEventLoop] = WeakSet()


def _detach_loops() -> None:
    """Give inherited event loops new selectors, and stop those that run.

    After a fork in the thread of an event loop, the child is inside that loop. With the parent's selector it would
    read from the parent's sockets, and its cleanup would unregister them. Event loops of uvloop are not changed.
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
