"""Chooses the hosts that receive a call, where there are too many to call all of them."""

import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from random import Random

from loom.bus.host_directory import HostKey
from loom.phases.match.announced_nodes import TaskRequirements
from loom.phases.match.directory import HostDirectory
from loom.schemas.identity import qualified

MAX_CALLED = 64
"""Most hosts of a call; where no more are present, a call goes to all of them."""
BEST_NODES = 32
"""Nodes with the highest mean rewards whose hosts are called."""
LEAST_TRIED = 16
"""Hosts of the nodes with the fewest rewards."""
REFRESH_S = 1.0
"""Least seconds between two searches for the hosts of one kind of task."""
REFRESH_SHARE = 0.01
"""Most of the time that such searches take."""
MAX_KINDS = 1024
"""Limit of remembered kinds of tasks; the least recently used ones are removed first."""


@dataclass
class _Candidates:
    """The hosts with nodes that are capable of one kind of task, as of the last search."""

    hosts: tuple[HostKey, ...]
    least_tried: tuple[HostKey, ...]
    """Fewer than 16 hosts whose nodes have the fewest rewards in the domain."""
    taking_turns: tuple[HostKey, ...]
    """The hosts after them, all with equally few rewards."""
    refresh_at: float = 0.0
    """Monotonic time of the next search."""
    turn: int = 0
    """Position in `taking_turns` of the next call."""

    @classmethod
    def of(cls, tries: dict[HostKey, int]) -> "_Candidates":
        """Return the candidates, from host -> number of rewards of its least tried node."""
        hosts = tuple(sorted(tries, key=lambda host: (tries[host], host)))
        limit = tries[hosts[min(LEAST_TRIED, len(hosts)) - 1]] if hosts else 0
        first, last = (bisect(hosts, limit, key=tries.__getitem__) for bisect in (bisect_left, bisect_right))
        return cls(hosts, hosts[:first], hosts[first:last])

    def next_least_tried(self) -> Iterator[HostKey]:
        """Yield the hosts with the fewest rewards; of more with equally few, each call takes the next ones."""
        yield from self.least_tried
        for _ in range(LEAST_TRIED - len(self.least_tried)):
            self.turn = (self.turn + 1) % len(self.taking_turns)
            yield self.taking_turns[self.turn]


class Shortlist:
    """Chooses at most 64 hosts: of the best nodes, of the least tried nodes, and others by chance.

    The chance is derived from the first task of the call, so that a repeated call goes to the same hosts.

    Args:
        directory: The present hosts, their nodes and profiles.
        clock: Returns monotonic seconds.
    """

    def __init__(self, directory: HostDirectory, clock: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._clock = clock
        self._kinds: OrderedDict[tuple[str, frozenset[str]], _Candidates] = OrderedDict()
        """(domain_token, required tools) -> candidates."""

    def hosts_for(self, requirements: TaskRequirements, task_id: str) -> tuple[HostKey, ...] | None:
        """Return the hosts to call for a task; None to call all hosts.

        All are called where at most 64 are present, and where no announced node is capable of the task.
        """
        if self._directory.bidding_hosts <= MAX_CALLED:
            return None
        candidates = self._candidates(requirements)
        if len(candidates.hosts) <= MAX_CALLED:
            return candidates.hosts or None
        chosen = dict.fromkeys(chain(self._best(requirements.domain_token), candidates.next_least_tried()))
        rng = Random(task_id)  # noqa: S311 - repeatable on purpose
        others = rng.sample(candidates.hosts, MAX_CALLED)
        chosen.update(dict.fromkeys(islice((host for host in others if host not in chosen), MAX_CALLED - len(chosen))))
        return tuple(chosen)

    def _best(self, domain_token: str) -> Iterator[HostKey]:
        for node in self._directory.ranking.best(domain_token, BEST_NODES):
            host = self._directory.host_of(node)
            if host is not None:
                yield host

    def _candidates(self, requirements: TaskRequirements) -> _Candidates:
        kind = (requirements.domain_token, requirements.tools)
        known, now = self._kinds.get(kind), self._clock()
        if known is not None and now < known.refresh_at:
            self._kinds.move_to_end(kind)
            return known
        found = self._search(requirements)
        took_s = self._clock() - now
        found.refresh_at = now + max(REFRESH_S, took_s / REFRESH_SHARE)
        found.turn = known.turn if known is not None else -1
        self._kinds[kind] = found
        self._kinds.move_to_end(kind)
        if len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)
        return found

    def _search(self, requirements: TaskRequirements) -> _Candidates:
        token, profiles = requirements.domain_token, self._directory.profiles
        tries: dict[HostKey, int] = {}
        for (host, node_id), _ in self._directory.nodes.capable_nodes(requirements._replace(excluded=()), plain=False):
            profile = profiles.get(qualified(host.owner, node_id))
            evidence = profile.domains.get(token) if profile else None
            count = evidence.count if evidence else 0
            tries[host] = min(count, tries.get(host, count))
        return _Candidates.of(tries)
