"""The event loop and the process that a connection belongs to: no other one may touch it."""

import asyncio
import os
from asyncio.events import _get_running_loop
from typing import Any, Protocol
from weakref import WeakSet

from loom.schemas.errors import LoomError

running_loop = _get_running_loop
"""Returns the running event loop, None without one: an exception for each message would cost too much."""


class WrongEventLoop(LoomError):
    """An object that is open in one event loop was used from another one, and is unharmed."""

    code = "wrong_event_loop"


def check_loop(loop: asyncio.AbstractEventLoop | None, what: str) -> None:
    """Return if `loop` is the running event loop.

    Args:
        loop: The one in which the object was opened; None: the object is not open in this process.
        what: The kind of object, for the message.

    Raises:
        WrongEventLoop: It is another one, or there is none.
    """
    if loop is None:
        raise WrongEventLoop(f"this {what} is not open in this process; open it, or one of its own, first")
    if running_loop() is not loop:
        raise WrongEventLoop(
            f"this {what} is open in another event loop; use asyncio.run_coroutine_threadsafe(…, loop), "
            f"or a {what} of its own"
        )


def is_elsewhere(loop: asyncio.AbstractEventLoop | None) -> bool:
    """Return whether `loop` is running in another thread."""
    return loop is not None and loop.is_running() and running_loop() is not loop


class Inherited(Protocol):
    """An object that a forked child gets together with sockets its parent goes on using."""

    def forget(self) -> None:
        """Drop them, in the child, without touching any."""
        ...


_holders: WeakSet[Any] = WeakSet()
_kept: list[Any] = []


def forget_in_children(holder: Inherited) -> None:
    """Call `holder.forget()` at the start of every forked child."""
    _holders.add(holder)


def keep(*things: Any) -> None:
    """Keep objects to the end of a forked child: their finalizers would unregister the parent's sockets."""
    _kept.append(things)


def _forget_all() -> None:
    for holder in list(_holders):
        holder.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
