"""The hosts that receive a call where there are too many to call all of them."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from support.auctions import announced, key

from loom.bus.host_directory import HostKey
from loom.phases.match.announced_nodes import AnnouncedNodes, TaskRequirements
from loom.phases.match.calls.shortlist import BEST_NODES, LEAST_TRIED, MAX_CALLED, REFRESH_S, Shortlist
from loom.phases.match.ranking import Ranking
from loom.schemas.auction import AnnouncedDomain, AnnouncedNode
from loom.schemas.learning.profile import DomainEvidence, NodeProfile

CODE = TaskRequirements("code", frozenset(), ())


class Clock:
    """Monotonic seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Hosts:
    """The facts of the directory that a shortlist reads: hosts with one node each, called like its host."""

    def __init__(self, count: int, *, domains: tuple[AnnouncedDomain, ...] | None = None) -> None:
        self.nodes, self.ranking = AnnouncedNodes(), Ranking()
        self.profiles: dict[str, NodeProfile] = {}
        self.bidding_hosts = count
        for number in range(count):
            name = f"h{number:04}"
            self.nodes.update(announced(name, nodes=(AnnouncedNode(node_id=name, domains=domains),)))

    def learn(self, number: int, count: int, mean: float) -> HostKey:
        """Give a node rewards in the domain `code`, and return its host."""
        name = f"h{number:04}"
        self.profiles[name] = NodeProfile(node_id=name, domains={"code": DomainEvidence(count=count, mean=mean)})
        self.ranking.update(name, {"code": mean})
        return key(name)

    def host_of(self, node: str) -> HostKey | None:
        return key(node)


def shortlist(hosts: Any, clock: Clock | None = None) -> Shortlist:
    return Shortlist(hosts, clock or Clock())


def chosen(made: Shortlist, task_ids: Iterable[str]) -> set[HostKey]:
    return {host for task_id in task_ids for host in made.hosts_for(CODE, task_id) or ()}


@pytest.mark.parametrize("count", [0, 1, MAX_CALLED])
def test_all_hosts_are_called_up_to_the_limit(count: int) -> None:
    assert shortlist(Hosts(count)).hosts_for(CODE, "t1") is None


def test_a_shortlist_has_each_host_once_and_as_many_as_the_limit() -> None:
    hosts = shortlist(Hosts(500)).hosts_for(CODE, "t1")
    assert hosts is not None
    assert len(hosts) == len(set(hosts)) == MAX_CALLED


def test_the_hosts_of_the_best_nodes_are_always_called() -> None:
    hosts = Hosts(500)
    best = {hosts.learn(number, 50, 0.9) for number in range(100, 100 + BEST_NODES)}
    for number in range(200, 300):
        hosts.learn(number, 50, 0.5)
    made = shortlist(hosts)
    for number in range(20):
        assert best <= set(made.hosts_for(CODE, f"t{number}") or ())


def test_hosts_with_the_least_tried_nodes_take_turns() -> None:
    hosts = Hosts(300)
    for number in range(200):
        hosts.learn(number, 50, 0.5)
    new = {key(f"h{number:04}") for number in range(200, 300)}
    calls = -(-len(new) // LEAST_TRIED)
    assert new <= chosen(shortlist(hosts), ["same"] * calls)


def test_the_least_tried_nodes_are_called_before_others() -> None:
    hosts = Hosts(300)
    few = {hosts.learn(number, 1, 0.5) for number in range(10)}
    for number in range(10, 300):
        hosts.learn(number, 50, 0.5)
    made = shortlist(hosts)
    for number in range(20):
        assert few <= set(made.hosts_for(CODE, f"t{number}") or ())


def test_the_others_depend_on_the_task_and_reach_all_hosts() -> None:
    hosts = Hosts(300)
    for number in range(300):
        hosts.learn(number, 5, 0.5)
    made = shortlist(hosts)
    assert chosen(made, map(str, range(200))) == {key(f"h{number:04}") for number in range(300)}


def test_hosts_without_a_capable_node_are_not_called() -> None:
    hosts = Hosts(100, domains=(AnnouncedDomain(domain="data"),))
    able = key("able")
    hosts.nodes.update(announced("able", nodes=(AnnouncedNode(node_id="able", tools=("search",)),)))
    assert shortlist(hosts).hosts_for(CODE, "t1") == (able,)
    assert shortlist(hosts).hosts_for(TaskRequirements("code", frozenset({"paint"}), ()), "t1") is None


def test_a_new_host_is_found_by_the_next_search() -> None:
    hosts, clock = Hosts(100, domains=(AnnouncedDomain(domain="data"),)), Clock()
    made = shortlist(hosts, clock)
    hosts.nodes.update(announced("first", nodes=(AnnouncedNode(node_id="first"),)))
    assert made.hosts_for(CODE, "t1") == (key("first"),)
    hosts.nodes.update(announced("second", nodes=(AnnouncedNode(node_id="second"),)))
    assert made.hosts_for(CODE, "t2") == (key("first"),)
    clock.now += REFRESH_S + 1
    assert made.hosts_for(CODE, "t3") == (key("first"), key("second"))


def test_searches_take_a_bounded_share_of_the_time() -> None:
    clock, searches = Clock(), []

    def capable_nodes(*_args: Any, **_facts: Any) -> Any:
        searches.append(clock.now)
        clock.now += 0.1  # a slow search
        return iter([((key(f"h{number}"), f"n{number}"), AnnouncedNode(node_id=f"n{number}")) for number in range(70)])

    hosts = Hosts(100)
    hosts.nodes = SimpleNamespace(capable_nodes=capable_nodes)  # type: ignore[assignment]
    made = shortlist(hosts, clock)
    while clock.now < 1100:
        made.hosts_for(CODE, "t1")
        clock.now += 0.5
    assert len(searches) <= 100 / (0.1 / 0.01) + 1
