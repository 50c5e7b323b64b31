"""The server's time: it follows the monotonic clock, and the most precise measurement that may still be right."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.bus.natsio.clock import ServerClock


class Clocks:
    """The two clocks of a process, set by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wall, self.monotonic = 1_000_000.0, 50.0
        monkeypatch.setattr(time, "time", lambda: self.wall)
        monkeypatch.setattr(time, "monotonic", lambda: self.monotonic)

    def pass_s(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


def test_before_a_measurement_the_time_is_the_wall_clocks_at_the_start(clocks: Clocks) -> None:
    clock = ServerClock()
    clocks.pass_s(5)
    clocks.wall += 3600

    assert not clock.measured
    assert clock.now() == 1_000_005


@pytest.mark.parametrize("step_s", [3600, -3600, 0.001, 1e9])
def test_a_step_of_the_wall_clock_changes_nothing_and_is_logged_once(clocks: Clocks, step_s: float) -> None:
    clock = ServerClock()
    clock.measure(2_000_000, 50, 50)
    clocks.pass_s(5)
    assert not clock.has_stepped()
    clocks.wall += step_s

    assert clock.now() == 2_000_005
    assert clock.wall_ahead_s == pytest.approx(step_s - 1_000_000)
    assert clock.has_stepped() is (abs(step_s) > 0.5)
    assert not clock.has_stepped()


def test_a_machine_that_was_suspended_is_noticed(clocks: Clocks) -> None:
    clock = ServerClock()
    clocks.wall += 60  # the monotonic clock has stood still

    assert clock.has_stepped()


def test_the_more_precise_of_two_measurements_that_agree_counts(clocks: Clocks) -> None:
    clock = ServerClock()
    clock.measure(2_000_000.5, 50, 51)
    assert clock.now() == 2_000_000  # half a second before the middle of question and answer
    clock.measure(2_000_000.21, 50, 50.002)
    assert clock.now() == pytest.approx(2_000_000.21, abs=0.002)
    clock.measure(2_000_000.9, 50, 52)
    assert clock.now() == pytest.approx(2_000_000.21, abs=0.002)


def test_a_measurement_that_excludes_the_time_before_counts_however_coarse_it_is(clocks: Clocks) -> None:
    clock = ServerClock()
    clock.measure(2_000_000, 50, 50.001)
    clock.measure(2_003_601, 50, 52)

    assert clock.now() == pytest.approx(2_003_600)


@given(st.floats(0, 1e9), st.lists(st.tuples(st.floats(0, 30), st.floats(0, 30)), min_size=1, max_size=8))
def test_the_time_is_never_further_off_than_half_the_shortest_round_trip(
    ahead_s: float, ways: list[tuple[float, float]]
) -> None:
    clock, at = ServerClock(), 1000.0
    for there_s, back_s in ways:
        clock.measure(at + there_s + ahead_s, at, at + there_s + back_s)

    off_s = abs(clock._offset_s - ahead_s)
    assert off_s <= min(there_s + back_s for there_s, back_s in ways) / 2 + 0.0011
