"""The hosts that an auction waits for: found in linear time, and rarely made-up ones."""

import time

import pytest
from support.auctions import key

from loom.bus.host_directory import ALIVE_S, HostKey
from loom.phases.match.calls.presence import (
    ANSWERS_PER_MISS,
    MAX_MISSED_WINDOWS,
    HostPresence,
)
from loom.phases.match.node_ownership import CONTEST_EVERY_S, SETTLE_S, NodeOwnership
from loom.phases.match.timings import MatchTimings


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def no_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loom.phases.match.calls.presence.UNPROVEN_BURST", 1)


def presence(clock: Clock, most: int = 100) -> HostPresence:
    return HostPresence(clock, most, lambda _: None)


def test_a_proven_host_is_awaited_until_it_misses_three_windows() -> None:
    hosts = presence(Clock())
    hosts.record_answers([key("h1")], set())
    for _ in range(MAX_MISSED_WINDOWS - 1):
        hosts.record_answers([], {key("h1")})
    assert hosts.awaited_hosts() == {key("h1")}
    hosts.record_answers([], {key("h1")})
    hosts.record_answers([key("good")], set())
    assert hosts.awaited_hosts() == {key("good")}
    for _ in range(MAX_MISSED_WINDOWS * ANSWERS_PER_MISS):
        assert key("h1") not in hosts.awaited_hosts()
        hosts.record_answers([key("good"), key("h1")], set())
    assert hosts.awaited_hosts() == {key("good"), key("h1")}


def test_a_host_that_answers_one_call_in_ten_is_not_awaited() -> None:
    clock = Clock()
    hosts = presence(clock)
    hosts.record_answers([key("good")], set())
    awaited = 0
    for number in range(1000):
        clock.now += 0.05
        hosts.record_announcement(key("picky"))
        waiting = key("picky") in hosts.awaited_hosts()
        awaited += waiting
        answers = number % 10 == 0
        hosts.record_answers(
            [key("good"), key("picky")] if answers else [key("good")],
            {key("picky")} if waiting and not answers else set(),
        )
    assert awaited < 50  # of a thousand auctions in 50 s


def test_newcomers_are_awaited_in_one_auction_a_second_and_at_most_three_times() -> None:
    clock = Clock()
    hosts = presence(clock)
    hosts.record_answers([key("good")], set())
    clock.now += MatchTimings.unproven_every_s
    hosts.record_announcement(key("new"))
    for _ in range(MAX_MISSED_WINDOWS):
        assert hosts.awaited_hosts() == {key("good"), key("new")}
        hosts.record_answers([key("good")], {key("new")})
        assert hosts.awaited_hosts() == {key("good")}
        clock.now += MatchTimings.unproven_every_s
        hosts.record_announcement(key("new"))
    assert hosts.awaited_hosts() == {key("good")}
    for _ in range(MAX_MISSED_WINDOWS * ANSWERS_PER_MISS):
        hosts.record_answers([key("new")], set())
    assert hosts.awaited_hosts() == {key("good"), key("new")}


def test_the_first_auction_after_a_start_waits_for_every_announced_host() -> None:
    hosts = presence(Clock())
    hosts.record_announcement(key("h1"))
    hosts.record_announcement(key("h2"))
    assert hosts.awaited_hosts() == {key("h1"), key("h2")}
    hosts.record_answers([key("h1")], {key("h2")})
    assert hosts.awaited_hosts() == {key("h1")}


def test_a_silent_proven_host_gets_another_chance_when_it_announces_itself() -> None:
    clock = Clock()
    hosts = presence(clock)
    hosts.record_answers([key("good"), key("slow")], set())
    for _ in range(MAX_MISSED_WINDOWS):
        hosts.record_answers([key("good")], {key("slow")})
    assert hosts.awaited_hosts() == {key("good")}
    clock.now += MatchTimings.unproven_every_s
    hosts.record_announcement(key("slow"))
    assert hosts.awaited_hosts() == {key("good"), key("slow")}


def test_two_hosts_that_join_one_after_the_other_are_both_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loom.phases.match.calls.presence.UNPROVEN_BURST", 2)
    hosts = presence(Clock())
    hosts.record_announcement(key("first"))
    assert hosts.awaited_hosts() == {key("first")}
    hosts.record_answers([key("first")], set())
    hosts.record_announcement(key("second"))
    assert hosts.awaited_hosts() == {key("first"), key("second")}
    hosts.record_announcement(key("third"))
    assert hosts.awaited_hosts() == {key("first")}


def test_a_host_that_only_answers_its_own_calls_is_awaited_in_few_auctions() -> None:
    """Twenty auctions a second; the windows of five of them overlap."""
    clock = Clock()
    hosts = presence(clock)
    hosts.record_answers([key("good")], set())
    awaited, open_windows = 0, list[set[HostKey]]()
    for number in range(1200):
        clock.now += 0.05
        if number % 20 == 0:
            hosts.record_announcement(key("picky"))
        waiting = key("picky") in hosts.awaited_hosts()
        awaited += waiting
        answers = number % 20 == 10
        open_windows.append({key("picky")} if waiting and not answers else set())
        if answers:
            hosts.record_answers([key("picky")], set())
        if len(open_windows) > 5:
            hosts.record_answers([key("good")], open_windows.pop(0))
    assert awaited < 1200 * 0.05


def test_made_up_hosts_push_out_no_proven_host() -> None:
    clock = Clock()
    hosts = presence(clock, most=10)
    hosts.record_answers([key("good")], set())
    for number in range(1000):
        hosts.record_announcement(key(f"h{number}"))
    assert len(hosts) == 10
    assert hosts.last_seen_at(key("good")) is not None
    assert hosts.last_seen_at(key("h0")) is None


def test_made_up_hosts_that_offer_are_bounded_and_a_new_host_finds_a_place() -> None:
    hosts = presence(Clock(), most=10)
    hosts.record_answers([key(f"h{number}") for number in range(50)], set())
    assert len(hosts) == 10
    hosts.record_announcement(key("new"))
    assert len(hosts) == 10
    assert hosts.last_seen_at(key("new")) is not None


def test_silent_hosts_are_dropped() -> None:
    clock = Clock()
    gone: list[HostKey] = []
    hosts = HostPresence(clock, 100, gone.append)
    for number in range(100):
        hosts.record_announcement(key(f"h{number}"))
        clock.now += ALIVE_S / 2
    hosts.awaited_hosts()
    assert len(hosts) <= 3
    assert len(gone) >= 97
    hosts.record_answers([], {key("h0")})
    assert not hosts._missed


def test_twenty_thousand_hosts_cost_linear_time() -> None:
    def cost_s(count: int) -> float:
        hosts = presence(Clock(), most=10_000)
        hosts.record_answers([key("good")], set())
        started = time.process_time()
        for number in range(count):
            hosts.record_announcement(key(f"h{number}"))
            if number % 10 == 0:
                hosts.record_answers([key("good")], hosts.awaited_hosts() - {key("good")})
        return time.process_time() - started

    few = min(cost_s(2_000) for _ in range(3))
    assert min(cost_s(20_000) for _ in range(3)) < 30 * few  # ten times the hosts; a square would be a hundred times


# -- nodes that more than one host announces


def test_a_node_belongs_to_the_first_host_that_is_alive() -> None:
    clock = Clock()
    hosts = presence(clock)
    ownership = NodeOwnership(clock, hosts.last_seen_at)
    for host_id in (key("first"), key("second")):
        hosts.record_announcement(host_id)
        clock.now += 0.1
    assert not ownership.record_announcement(key("first"), ("good-1",))
    assert ownership.record_announcement(key("second"), ("good-1", "own"))
    assert ownership.is_contested("good-1")
    hosts.record_announcement(key("first"))  # the host was asked to announce itself
    clock.now += SETTLE_S
    assert not ownership.is_contested("good-1")
    assert ownership.host_of("good-1") == key("first")
    assert ownership.host_of("own") == key("second")
    assert ownership.host_of("unknown") is None


def test_a_node_that_moved_to_another_host_is_known_when_the_first_host_dies() -> None:
    clock = Clock()
    hosts = presence(clock)
    ownership = NodeOwnership(clock, hosts.last_seen_at)
    hosts.record_announcement(key("dead"))
    ownership.record_announcement(key("dead"), ("n1",))
    clock.now += 1
    hosts.record_announcement(key("reborn"))
    assert ownership.record_announcement(key("reborn"), ("n1",))
    clock.now += SETTLE_S
    assert ownership.host_of("n1") == key("reborn")


def test_many_made_up_claims_do_not_keep_a_node_contested() -> None:
    clock = Clock()
    hosts = presence(clock)
    ownership = NodeOwnership(clock, hosts.last_seen_at)
    for number in range(int(CONTEST_EVERY_S / 0.1)):
        hosts.record_announcement(key(f"h{number}"))
        hosts.record_announcement(key("h0"))
        contested = ownership.record_announcement(key(f"h{number}"), ("n1",))
        assert contested == (number == 1)
        clock.now += 0.1
    assert not ownership.is_contested("n1")
    assert ownership.host_of("n1") == key("h0")


def test_a_host_that_no_longer_has_a_node_loses_it() -> None:
    clock = Clock()
    hosts = presence(clock)
    ownership = NodeOwnership(clock, hosts.last_seen_at)
    hosts.record_announcement(key("h1"))
    ownership.record_announcement(key("h1"), ("n1", "n2"))
    ownership.record_announcement(key("h1"), ("n2",))
    assert (ownership.host_of("n1"), ownership.host_of("n2"), ownership.size) == (None, key("h1"), 1)
    ownership.remove_host(key("h1"))
    assert (ownership.host_of("n2"), ownership.size) == (None, 0)
