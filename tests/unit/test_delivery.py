"""Metadata of a delivery, and the limits after which a message is suspect or dead."""

from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.aio.msg import Msg

from loom.bus.hops.delivery import DEAD_AFTER, SUSPECT_AFTER, Delivery, Slots, suspect_order
from loom.bus.hops.isolation import SharedExclusiveLock
from loom.bus.natsio.ack_metadata import AckMetadata, ack_metadata, rfc3339

OLD = "$JS.ACK.LOOM_TASKS.match_low.{delivered}.{stream}.{consumer}.{at}.{pending}"
NEW = "$JS.ACK.hub.acchash.LOOM_TASKS.match_low.{delivered}.{stream}.{consumer}.{at}.{pending}"
counts = st.integers(0, 2**63)


@pytest.mark.parametrize("form", [OLD, NEW, NEW + ".random"])
@settings(deadline=None)
@given(delivered=counts, stream=counts, consumer=counts, at=st.integers(0, 2**62), pending=counts)
def test_facts_are_read_from_every_form_of_the_reply(
    form: str, delivered: int, stream: int, consumer: int, at: int, pending: int
) -> None:
    facts = ack_metadata(form.format(delivered=delivered, stream=stream, consumer=consumer, at=at, pending=pending))
    assert facts == AckMetadata(
        delivered=delivered,
        stream_seq=stream,
        consumer_seq=consumer,
        stored_at=at / 1e9,
        pending=pending,
        stream="LOOM_TASKS",
    )


def _delivery(times: int) -> Delivery:
    reply = OLD.format(delivered=times, stream=7, consumer=9, at=1, pending=0)
    return Delivery(Msg(_client=None, subject="loom.task.match.low.t1", reply=reply), Slots(4), SharedExclusiveLock())  # type: ignore[arg-type]


def test_a_message_is_suspect_after_three_deliveries_and_dead_after_ten() -> None:
    assert (SUSPECT_AFTER, DEAD_AFTER) == (3, 10)
    assert [_delivery(n).is_suspect for n in (1, 3, 4, 10, 11)] == [False, False, True, True, True]
    assert [_delivery(n).exceeded_max_deliveries for n in (1, 4, 10, 11)] == [False, False, False, True]


@pytest.mark.slow
async def test_a_delivery_releases_its_lock_once() -> None:
    delivery = _delivery(5)
    delivery.release()  # it had not entered: nothing to give back
    await delivery.acquire()
    delivery.release()
    delivery.release()
    again = _delivery(5)
    again._lock = delivery._lock
    await again.acquire()


def test_slots_count_the_free_places() -> None:
    slots = Slots(4)
    slots.taken = 3
    assert slots.free == 1


@settings(deadline=None)
@given(at=st.floats(0, 4e9))
def test_a_stamp_is_the_same_moment_with_its_offset(at: float) -> None:
    read = datetime.fromisoformat(rfc3339(at))
    assert read.tzinfo is not None
    assert read.timestamp() == pytest.approx(at, abs=1e-6)


@given(*[st.integers(1, 2**40)] * 2, st.sampled_from(range(4, 11, 2)))
def test_of_two_suspects_each_comes_first_once_in_two_deliveries(one: int, other: int, delivered: int) -> None:
    def places(count: int) -> list[float]:
        return [
            suspect_order(AckMetadata(delivered=count, stream_seq=seq, stored_at=0, pending=0)) for seq in (one, other)
        ]

    (mine, others), (later, others_later) = places(delivered), places(delivered + 1)
    assert 0 <= min(mine, others, later, others_later) <= max(mine, others, later, others_later) <= 1
    assert one == other or (mine < others) != (later < others_later)
