"""Hosts an auction waits for: in linear time, and made-up ones seldom."""

import time

import pytest
from support.auctions import key

from loom.bus.host_directory import ALIVE_S, HostKey
from loom.phases.match.node_ownership import CONTEST_EVERY_S, SETTLE_S, Claims
from loom.phases.match.presence import ANSWERS, MISSED_WINDOWS, NEWCOMERS_EVERY_S, Presence


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def no_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loom.phases.match.presence.BURST", 1)


def presence(clock: Clock, most: int = 100) -> Presence:
    return Presence(clock, most, lambda _: None)


def test_a_proven_host_is_awaited_until_it_misses_three_windows() -> None:
    hosts = presence(Clock())
    hosts.answered([key("h1")], set())
    for _ in range(MISSED_WINDOWS - 1):
        hosts.answered([], {key("h1")})
    assert hosts.awaited() == {key("h1")}
    hosts.answered([], {key("h1")})
    hosts.answered([key("good")], set())
    assert hosts.awaited() == {key("good")}
    for _ in range(MISSED_WINDOWS * ANSWERS):
        assert key("h1") not in hosts.awaited()
        hosts.answered([key("good"), key("h1")], set())
    assert hosts.awaited() == {key("good"), key("h1")}


def test_a_host_that_answers_one_call_in_ten_is_not_awaited() -> None:
    clock = Clock()
    hosts = presence(clock)
    hosts.answered([key("good")], set())
    awaited = 0
    for number in range(1000):
        clock.now += 0.05
        hosts.announced(key("picky"))
        waiting = key("picky") in hosts.awaited()
        awaited += waiting
        answers = number % 10 == 0
        hosts.answered(
            [key("good"), key("picky")] if answers else [key("good")],
            {key("picky")} if waiting and not answers else set(),
        )
    assert awaited < 50  # of a thousand auctions in 50 s


def test_newcomers_are_awaited_in_one_auction_a_second_and_at_most_three_times() -> None:
    clock = Clock()
    hosts = presence(clock)
    hosts.answered([key("good")], set())
    clock.now += NEWCOMERS_EVERY_S
    hosts.announced(key("new"))
    for _ in range(MISSED_WINDOWS):
        assert hosts.awaited() == {key("good"), key("new")}
        hosts.answered([key("good")], {key("new")})
        assert hosts.awaited() == {key("good")}
        clock.now += NEWCOMERS_EVERY_S
        hosts.announced(key("new"))
    assert hosts.awaited() == {key("good")}
    for _ in range(MISSED_WINDOWS * ANSWERS):
        hosts.answered([key("new")], set())
    assert hosts.awaited() == {key("good"), key("new")}


def test_the_first_auction_after_a_start_waits_for_every_announced_host() -> None:
    hosts = presence(Clock())
    hosts.announced(key("h1"))
    hosts.announced(key("h2"))
    assert hosts.awaited() == {key("h1"), key("h2")}
    hosts.answered([key("h1")], {key("h2")})
    assert hosts.awaited() == {key("h1")}


def test_a_silent_proven_host_gets_another_chance_when_it_announces_itself() -> None:
    clock = Clock()
    hosts = presence(clock)
    hosts.answered([key("good"), key("slow")], set())
    for _ in range(MISSED_WINDOWS):
        hosts.answered([key("good")], {key("slow")})
    assert hosts.awaited() == {key("good")}
    clock.now += NEWCOMERS_EVERY_S
    hosts.announced(key("slow"))
    assert hosts.awaited() == {key("good"), key("slow")}


def test_two_hosts_that_join_one_after_the_other_are_both_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loom.phases.match.presence.BURST", 2)
    hosts = presence(Clock())
    hosts.announced(key("first"))
    assert hosts.awaited() == {key("first")}
    hosts.answered([key("first")], set())
    hosts.announced(key("second"))
    assert hosts.awaited() == {key("first"), key("second")}
    hosts.announced(key("third"))
    assert hosts.awaited() == {key("first")}


def test_a_host_that_only_answers_its_own_calls_is_awaited_in_few_auctions() -> None:
    """Twenty auctions a second; the windows of five of them overlap."""
    clock = Clock()
    hosts = presence(clock)
    hosts.answered([key("good")], set())
    awaited, open_windows = 0, list[set[HostKey]]()
    for number in range(1200):
        clock.now += 0.05
        if number % 20 == 0:
            hosts.announced(key("picky"))
        waiting = key("picky") in hosts.awaited()
        awaited += waiting
        answers = number % 20 == 10
        open_windows.append({key("picky")} if waiting and not answers else set())
        if answers:
            hosts.answered([key("picky")], set())
        if len(open_windows) > 5:
            hosts.answered([key("good")], open_windows.pop(0))
    assert awaited < 1200 * 0.05


def test_made_up_hosts_push_out_no_proven_host() -> None:
    clock = Clock()
    hosts = presence(clock, most=10)
    hosts.answered([key("good")], set())
    for number in range(1000):
        hosts.announced(key(f"h{number}"))
    assert len(hosts) == 10
    assert hosts.seen_at(key("good")) is not None
    assert hosts.seen_at(key("h0")) is None


def test_made_up_hosts_that_offer_are_bounded_and_a_new_host_finds_a_place() -> None:
    hosts = presence(Clock(), most=10)
    hosts.answered([key(f"h{number}") for number in range(50)], set())
    assert len(hosts) == 10
    hosts.announced(key("new"))
    assert len(hosts) == 10
    assert hosts.seen_at(key("new")) is not None


def test_hosts_that_come_and_go_are_forgotten() -> None:
    clock = Clock()
    gone: list[HostKey] = []
    hosts = Presence(clock, 100, gone.append)
    for number in range(100):
        hosts.announced(key(f"h{number}"))
        clock.now += ALIVE_S / 2
    hosts.awaited()
    assert len(hosts) <= 3
    assert len(gone) >= 97
    hosts.answered([], {key("h0")})
    assert not hosts._missed


def test_twenty_thousand_hosts_cost_linear_time() -> None:
    def cost_s(count: int) -> float:
        hosts = presence(Clock(), most=10_000)
        hosts.answered([key("good")], set())
        started = time.process_time()
        for number in range(count):
            hosts.announced(key(f"h{number}"))
            if number % 10 == 0:
                hosts.answered([key("good")], hosts.awaited() - {key("good")})
        return time.process_time() - started

    few = min(cost_s(2_000) for _ in range(3))
    assert min(cost_s(20_000) for _ in range(3)) < 30 * few  # ten times the hosts; a square would be a hundred times


# -- nodes that more than one host announces


def test_a_node_belongs_to_the_first_host_that_is_alive() -> None:
    clock = Clock()
    hosts = presence(clock)
    claims = Claims(clock, hosts.seen_at)
    for host_id in (key("first"), key("second")):
        hosts.announced(host_id)
        clock.now += 0.1
    assert not claims.announce(key("first"), ("good-1",))
    assert claims.announce(key("second"), ("good-1", "own"))
    assert claims.is_open("good-1")
    hosts.announced(key("first"))  # the host was asked to announce itself
    clock.now += SETTLE_S
    assert not claims.is_open("good-1")
    assert claims.host_of("good-1") == key("first")
    assert claims.host_of("own") == key("second")
    assert claims.host_of("unknown") is None


def test_a_node_that_came_back_on_another_host_is_there_at_once_when_the_first_is_dead() -> None:
    clock = Clock()
    hosts = presence(clock)
    claims = Claims(clock, hosts.seen_at)
    hosts.announced(key("dead"))
    claims.announce(key("dead"), ("n1",))
    clock.now += 1
    hosts.announced(key("reborn"))
    assert claims.announce(key("reborn"), ("n1",))
    clock.now += SETTLE_S
    assert claims.host_of("n1") == key("reborn")


def test_many_made_up_claims_do_not_keep_a_node_contested() -> None:
    clock = Clock()
    hosts = presence(clock)
    claims = Claims(clock, hosts.seen_at)
    for number in range(int(CONTEST_EVERY_S / 0.1)):
        hosts.announced(key(f"h{number}"))
        hosts.announced(key("h0"))
        contested = claims.announce(key(f"h{number}"), ("n1",))
        assert contested == (number == 1)
        clock.now += 0.1
    assert not claims.is_open("n1")
    assert claims.host_of("n1") == key("h0")


def test_a_host_that_no_longer_has_a_node_loses_it() -> None:
    clock = Clock()
    hosts = presence(clock)
    claims = Claims(clock, hosts.seen_at)
    hosts.announced(key("h1"))
    claims.announce(key("h1"), ("n1", "n2"))
    claims.announce(key("h1"), ("n2",))
    assert (claims.host_of("n1"), claims.host_of("n2"), claims.size) == (None, key("h1"), 1)
    claims.forget(key("h1"))
    assert (claims.host_of("n2"), claims.size) == (None, 0)
