"""A warning for a domain that looks misspelt."""

import time
from collections.abc import Callable

from loom.phases.match.announced_nodes import AnnouncedNodes
from loom.schemas.envelope import Envelope
from loom.schemas.text.nearest_name import nearest_domain
from loom.schemas.tokens import domain_token

BEGINNING = "no node rates itself in "
FRESH_S = 3.0
"""How long the nearest of the announced domains is kept for a domain: an auction costs no search."""
MOST_KEPT = 256


class Misspelt:
    """Finds, for a domain that no node has announced, the announced one that was probably meant.

    Args:
        nodes: What the present hosts have announced.
        clock: Returns seconds that never go back.
    """

    def __init__(self, nodes: AnnouncedNodes, clock: Callable[[], float] = time.monotonic) -> None:
        self._nodes = nodes
        self._clock = clock
        self._nearest: dict[str, tuple[float, str]] = {}
        """domain_token -> when the nearest domain was looked for, and which it is; empty: there is none."""

    def warning_for(self, envelope: Envelope) -> str:
        """Return a sentence on the domain that the ad names, where a known one was probably meant; else an empty text.

        Nodes without named domains do not cause a warning. A task gets one warning.
        """
        domain = envelope.ad.domain.strip()
        if not domain or self._nodes.takes(envelope.domain_token) or warning_in(envelope) is not None:
            return ""
        near = self._near(domain)
        return f"{BEGINNING}{domain!r}; did you mean {near!r}?" if near else ""

    def _near(self, domain: str) -> str:
        token, now = domain_token(domain), self._clock()
        at, near = self._nearest.get(token, (0.0, ""))
        if token not in self._nearest or now - at >= FRESH_S:
            near = nearest_domain(domain, self._nodes.domains()) or ""
            if len(self._nearest) >= MOST_KEPT:
                self._nearest.clear()
            self._nearest[token] = (now, near)
        return near


def warning_in(envelope: Envelope) -> str | None:
    """Return the warning that a task has had already."""
    return next((warning for warning in envelope.warnings if warning.startswith(BEGINNING)), None)
