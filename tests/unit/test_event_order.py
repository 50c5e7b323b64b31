"""The order of a run's events: each once, in order, and what a gap does."""

from hypothesis import given
from hypothesis import strategies as st

from loom.phases.execute.ordering import GAP_S, MOST_ASKS, EventOrder
from loom.schemas.run import RunEvent, RunKind


def event(n: int, kind: RunKind = "delta") -> RunEvent:
    return RunEvent(n=n, kind="accepted" if n == 0 and kind == "delta" else kind)


def numbers(events: list[RunEvent]) -> list[int]:
    return [each.n for each in events]


def test_events_behind_a_gap_wait_for_the_missing_ones() -> None:
    order = EventOrder(0)
    assert numbers(order.take([event(0)], 0)) == [0]
    assert order.take([event(2)], 0) == []
    assert order.asks(0)
    assert order.next_n == 1
    assert order.take([event(3)], 0.1) == []
    assert not order.asks(0.1)
    assert numbers(order.take([event(0), event(1), event(2), event(3)], 0.2)) == [1, 2, 3]
    assert not order.asks(9)


def test_a_gap_within_one_message_is_no_loss() -> None:
    order = EventOrder(0)
    assert numbers(order.take([event(0), event(1), event(7), event(9)], 0)) == [0, 1, 7, 9]
    assert not order.asks(0)


def test_an_answer_without_the_missing_events_ends_the_wait() -> None:
    order = EventOrder(1)
    assert order.take([event(4)], 0) == []
    assert order.asks(0)
    assert numbers(order.take([event(0)], 0.1)) == [4]
    assert order.next_n == 5


def test_a_heartbeat_with_a_later_number_reveals_a_gap_and_a_stand_in_does_not() -> None:
    order = EventOrder(3)
    assert numbers(order.take([event(0, "heartbeat")], 0)) == [0]
    assert not order.asks(0)
    assert order.take([event(4, "heartbeat")], 0) == []
    assert order.asks(0)
    assert numbers(order.take([event(0, "heartbeat")], 0.1)) == [0]
    assert order.next_n == 3


def test_a_gap_that_no_host_answers_is_accepted() -> None:
    order, now = EventOrder(1), 0.0
    assert order.take([event(3)], now) == []
    for _ in range(MOST_ASKS):
        assert order.asks(now)
        now += GAP_S
    assert not order.asks(now)
    assert numbers(order.take([event(4)], now)) == [3, 4]


def test_a_last_event_waits_for_none() -> None:
    order = EventOrder(1)
    assert order.take([event(3)], 0) == []
    assert numbers(order.take([event(9, "result")], 0)) == [3, 9]


@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=4), max_size=12), st.integers(0, 3))
def test_whatever_comes_each_event_is_passed_on_once_and_in_order(messages: list[list[int]], next_n: int) -> None:
    order, passed = EventOrder(next_n), list[int]()
    for turn, message in enumerate(messages):
        order.asks(turn)
        passed += numbers(order.take([event(n) for n in message], turn))
    assert passed == sorted(set(passed))
    assert all(n >= next_n for n in passed)


@given(st.permutations(range(1, 9)))
def test_events_in_any_order_come_out_complete(arrivals: list[int]) -> None:
    order, passed = EventOrder(1), list[int]()
    for n in arrivals:
        passed += numbers(order.take([event(n)], 0))
    assert passed == list(range(1, 9))
