"""A short memory that a model is down, so that not every task waits for it."""

import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

from loom.schemas.llm import LLMProvider

FAILURES = 3
"""Failures in a row after which a model counts as down."""
REST_S = 30.0
"""For how long it is not asked then; after that one question finds out whether it is back."""


class Breaker:
    """Counts a model's failures in a row; after three of them it may be asked once every 30 s.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._rests_until = 0.0

    def may_ask(self) -> bool:
        """Return whether the model may be asked; of a model that is down, each true stands for one probe."""
        if self._failures < FAILURES:
            return True
        now = self._clock()
        if now < self._rests_until:
            return False
        self._rests_until = now + REST_S  # the others wait for what becomes of this one
        return True

    def succeeded(self) -> None:
        """Note an answer, were it a refusal: the model is there."""
        self._failures = 0

    def failed(self) -> None:
        """Note that no answer came."""
        self._failures += 1
        if self._failures >= FAILURES:
            self._rests_until = self._clock() + REST_S


_breakers: WeakKeyDictionary[LLMProvider, Breaker] = WeakKeyDictionary()


def breaker_of(provider: LLMProvider) -> Breaker:
    """Return the breaker of a provider: the phases of one process share what they know of it."""
    try:
        return _breakers.setdefault(provider, Breaker())
    except TypeError:  # it cannot be hashed or weakly referenced; nothing is remembered then
        return Breaker()
