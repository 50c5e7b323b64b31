"""The hosts that an auction waits for, kept as sets that follow each message."""

from hypothesis import given
from hypothesis import strategies as st

from loom.bus.host_directory import ALIVE_S, HostKey
from loom.phases.match.calls.presence import HostPresence

HOSTS = [HostKey("local", f"h{number}") for number in range(4)]
step = st.one_of(
    st.tuples(st.just("announce"), st.sampled_from(HOSTS), st.booleans()),
    st.tuples(st.just("answer"), st.sampled_from(HOSTS), st.just(False)),
    st.tuples(st.just("miss"), st.sampled_from(HOSTS), st.just(False)),
    st.tuples(st.just("remove"), st.sampled_from(HOSTS), st.just(False)),
    st.tuples(st.just("wait"), st.sampled_from(HOSTS), st.just(False)),
)


@given(st.lists(step, max_size=60))
def test_untried_hosts_are_the_unproven_ones_that_answer_calls_and_are_not_dropped(
    steps: list[tuple[str, HostKey, bool]],
) -> None:
    now = [1000.0]
    presence = HostPresence(lambda: now[0], 3, lambda _: None)
    for kind, host, plain in steps:
        match kind:
            case "announce":
                presence.record_announcement(host, plain=plain)
            case "answer":
                presence.record_answers([host], set())
            case "miss":
                presence.record_answers([], {host})
            case "remove":
                presence.remove(host)
            case _:
                now[0] += ALIVE_S / 3
        awaited = presence.awaited_hosts()
        assert presence._untried == presence._unproven.keys() - presence._dropped - presence._plain
        assert not presence._returning & presence._plain
        assert not awaited & presence._plain
