"""The times of MATCH."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MatchTimings:
    """Waits and pauses of MATCH, in seconds."""

    announce_wait_s: float = 0.5
    """Time between the request for announcements and the first task, so that all hosts can take part."""
    max_hold_s: float = 5.0
    """Time for which a task without a node is held in memory before it returns to the end of its lane."""
    min_pause_s: float = 0.1
    """Shortest pause between two calls for a task while all nodes are busy."""
    max_pause_s: float = 2.0
    """Longest pause between two such calls."""
    no_offers_pause_s: float = 1.0
    """Pause between two calls for a task that no node is capable of."""
    unproven_every_s: float = 2.0
    """Time per auction that also waits for unproven hosts: an announcement costs nothing, unlike an offer."""
    spawn_every_s: float = 1.0
    """Time between two tasks of a domain that pass through SCALE because their nodes have no free slot."""
