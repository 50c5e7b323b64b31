"""Warnings about domains that are probably misspelt."""

import time
from collections.abc import Callable

from loom.phases.match.announced_nodes import AnnouncedNodes
from loom.schemas.envelope import Envelope
from loom.schemas.text.nearest_name import nearest_domain
from loom.schemas.tokens import domain_token

WARNING_PREFIX = "no node rates itself in "
CACHE_S = 3.0
"""Seconds for which the nearest announced domain is cached, so that an auction does not repeat the search."""
MAX_CACHED = 256


class MisspeltDomains:
    """Finds the announced domain that was probably meant by a domain that no node announces.

    Args:
        nodes: The index of announced nodes.
        clock: Returns monotonic seconds.
    """

    def __init__(self, nodes: AnnouncedNodes, clock: Callable[[], float] = time.monotonic) -> None:
        self._nodes = nodes
        self._clock = clock
        self._nearest: dict[str, tuple[float, str]] = {}
        """domain_token -> (monotonic time of the search, nearest domain or empty text)."""

    def warning_for(self, envelope: Envelope) -> str:
        """Return a warning about the ad's domain where a similar domain is announced; otherwise an empty text.

        Nodes that accept any domain do not prevent the warning. A task gets one warning at most.
        """
        domain = envelope.ad.domain.strip()
        if not domain or self._nodes.has_domain(envelope.domain_token) or warning_in(envelope) is not None:
            return ""
        nearest = self._nearest_domain(domain)
        return f"{WARNING_PREFIX}{domain!r}; did you mean {nearest!r}?" if nearest else ""

    def _nearest_domain(self, domain: str) -> str:
        token, now = domain_token(domain), self._clock()
        searched_at, nearest = self._nearest.get(token, (0.0, ""))
        if token not in self._nearest or now - searched_at >= CACHE_S:
            nearest = nearest_domain(domain, self._nodes.domains()) or ""
            if len(self._nearest) >= MAX_CACHED:
                self._nearest.clear()
            self._nearest[token] = (now, nearest)
        return nearest


def warning_in(envelope: Envelope) -> str | None:
    """Return the misspelt-domain warning that an envelope already has; None without one."""
    return next((warning for warning in envelope.warnings if warning.startswith(WARNING_PREFIX)), None)
