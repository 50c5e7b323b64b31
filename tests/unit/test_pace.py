from loom.phases.shared.pace import Pace


class Clock:
    """Monotonic seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_each_key_is_allowed_once_in_a_period() -> None:
    clock = Clock()
    pace = Pace(2.0, clock)
    assert [pace.allows("a"), pace.allows("a"), pace.allows("b")] == [True, False, True]
    clock.now += 1.9
    assert not pace.allows("a")
    clock.now += 0.2
    assert [pace.allows("a"), pace.allows("b"), pace.allows("a")] == [True, True, False]


def test_a_refused_event_does_not_begin_a_period() -> None:
    clock = Clock()
    pace = Pace(2.0, clock)
    pace.allows("a")
    clock.now += 1.5
    pace.allows("a")
    clock.now += 0.6
    assert pace.allows("a")


def test_keys_of_past_periods_are_forgotten() -> None:
    clock = Clock()
    pace = Pace(1.0, clock)
    for number in range(1000):
        clock.now += 0.1
        pace.allows(number)
    assert len(pace._recent) <= 11
