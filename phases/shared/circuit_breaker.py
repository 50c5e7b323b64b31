"""A circuit breaker for models, so that not every task waits for one that is down."""

import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

from loom.schemas.llm import LLMProvider

MAX_FAILURES = 3
"""Consecutive failures after which the circuit opens."""
OPEN_S = 30.0
"""Seconds for which an open circuit allows no call; then one call probes the model."""


class CircuitBreaker:
    """Counts a model's consecutive failures; after three of them it allows one call per 30 s.

    Args:
        clock: Returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._open_until = 0.0

    def allow_request(self) -> bool:
        """Return whether a call is allowed; with an open circuit, True stands for one probe."""
        if self._failures < MAX_FAILURES:
            return True
        now = self._clock()
        if now < self._open_until:
            return False
        self._open_until = now + OPEN_S  # other calls wait for the result of this probe
        return True

    def record_success(self) -> None:
        """Record an answer of the model, which may be a refusal, and close the circuit."""
        self._failures = 0

    def record_failure(self) -> None:
        """Record a call without an answer."""
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            self._open_until = self._clock() + OPEN_S


_breakers: WeakKeyDictionary[LLMProvider, CircuitBreaker] = WeakKeyDictionary()


def breaker_for(provider: LLMProvider) -> CircuitBreaker:
    """Return the circuit breaker of a provider, which all phases of the process share."""
    try:
        return _breakers.setdefault(provider, CircuitBreaker())
    except TypeError:  # the provider is not hashable or weakly referenceable: its failures are not counted
        return CircuitBreaker()
