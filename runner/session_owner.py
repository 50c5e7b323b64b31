"""One session, opened on demand, for one event loop at a time."""

import os
import threading
from collections.abc import Callable

from loom.bus.natsio.loop_ownership import Owner
from loom.runner.session import Inheritance, Session


class SessionOwner:
    """Keeps the session of a Runtime or an AmoebaLoop; the event loop that opens it owns it.

    Every other living event loop is refused, and the session is not touched. A session whose loop is closed, or
    that a forked child inherited, is replaced.

    Args:
        make: Returns a session of the running event loop, not yet open; gets what a parent process left, if any.
    """

    def __init__(self, make: Callable[[Inheritance | None], Session]) -> None:
        self._make = make
        self._session: Session | None = None

    @property
    def owner(self) -> Owner | None:
        """The owner of the session; None when there is none, or it can only be replaced."""
        session = self._session
        return session.owner if session is not None and session.owner.lives else None

    @property
    def inheritance(self) -> Inheritance | None:
        """What a parent process left to this one, while no session of its own is open."""
        return self._session.inheritance if self._session is not None else None

    async def open(self) -> Session:
        """Return the session of the running event loop; the first caller opens it.

        Raises:
            WrongEventLoop: It is open, or being opened, in another event loop.
            BusUnavailable: No server or no phases answer.
            ServiceFailed: An essential task of the session has failed.
        """
        while True:
            session = self._claim()
            async with session.opening:
                if session is not self._session:
                    continue  # it was closed, or could not be opened, meanwhile
                if not session.is_open:
                    try:
                        await session.open()
                    except BaseException:
                        self._release(session)
                        raise
                else:
                    session.check()
                return session

    async def aclose(self) -> None:
        """Drain and close the session; safe to call twice.

        Raises:
            WrongEventLoop: It is open in another event loop.
        """
        session = self._session
        if session is None:
            return
        if not session.owner.lives:
            self.abort()
            return
        session.owner.check()
        async with session.opening:  # released last: the next session may need the same store
            try:
                await session.aclose()
            finally:
                self._release(session)

    def abort(self) -> None:
        """Drop the session at once, from any thread; safe to call twice."""
        session, self._session = self._session, None
        if session is not None:
            session.abort()

    def _claim(self) -> Session:
        with _claims:
            dead = self._session
            if dead is not None and dead.owner.lives:
                dead.owner.check()
                return dead
            session = self._session = self._make(self.inheritance)
        if dead is not None:
            dead.abort()
        return session

    def _release(self, session: Session) -> None:
        if self._session is session:
            self._session = None


_claims = threading.Lock()
"""Held while a session changes hands; released in a forked child, whatever thread held it."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_claims.acquire, after_in_parent=_claims.release, after_in_child=_claims.release)
