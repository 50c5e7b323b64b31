"""The counts of a host's discarded messages, and their text."""

import pytest
from support.logs import capture_logs

from loom.bus.hops.health import Health
from loom.bus.logs.discard_reports import MAX_HOSTS, MAX_REASON, DiscardReport, merged_reports
from loom.bus.logs.discards import LINES, Discards
from loom.schemas.base import MAX_MESSAGE_BYTES, decode, encode


def test_counts_of_a_host_have_the_last_reason() -> None:
    discards = Discards()
    with capture_logs() as logs:
        discards.add_from_host("h1", "offers", "offer_undecodable", reason="Expected `int`")
        discards.add_from_host("h1", "offers", "offer_undecodable", reason="Expected `str`")
        discards.add_from_host("h1", "events", "run_event_left_out", reason="late", task_id="t1")
        discards.add_from_host("h2", "bids", "bid_undecodable", reason="odd")
    assert discards.hosts["h1"].summary == "1 event, 2 offers (last: late)"
    assert discards.hosts["h2"].summary == "1 bid (last: odd)"
    assert dict(discards.counts) == {"offer_undecodable": 2, "run_event_left_out": 1, "bid_undecodable": 1}
    assert [(log["host_id"], log["reason"]) for log in logs][2:] == [("h1", "late"), ("h2", "odd")]
    assert logs[2]["task_id"] == "t1"


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("a\nb\t c", "a b c"),
        ("\x1b[31mred\x07", "�[31mred�"),
        ("\u202egnp", "�gnp"),
        ("x" * 10_000, "x" * MAX_REASON),
        ("数" * 10_000, "数" * MAX_REASON),
    ],
)
def test_a_reason_is_one_printable_line_of_bounded_length(reason: str, shown: str) -> None:
    discards = Discards()
    discards.add_from_host("h1", "offers", "offer_undecodable", reason=reason)
    assert discards.hosts["h1"].last == shown


def test_a_flood_of_hosts_leaves_the_newest_hundred_in_a_report_that_can_be_read() -> None:
    discards = Discards()
    with capture_logs() as logs:
        for number in range(1000):
            discards.add_from_host(f"{number:-<300}", "events", "run_event_left_out", reason="\x1b数" * 500)
            discards.add_from_host("always", "offers", "offer_undecodable", reason="x")
    assert len(discards.hosts) == MAX_HOSTS
    assert discards.hosts["always"].counts == {"offers": 1000}
    report = Health(left_out=dict(discards.hosts))
    raw = encode(encode(report).decode())
    assert len(raw) < MAX_MESSAGE_BYTES / 2
    assert decode(encode(report), Health) == report
    assert len(logs) == 2 * LINES


def test_reports_of_several_processes_are_merged_and_an_announcement_counts_once() -> None:
    one = DiscardReport(counts={"announcements": 5, "offers": 2}, last="older", at=1.0)
    other = DiscardReport(counts={"announcements": 4, "events": 1, "offers": 1}, last="newer", at=2.0)
    found = merged_reports([{"h2": one}, {"h2": other, "h1": one}, {}])
    assert list(found) == ["h1", "h2"]
    assert found["h1"] == one
    assert found["h2"].summary == "5 announcements, 1 event, 3 offers (last: newer)"


def test_a_count_of_a_newer_version_can_be_read() -> None:
    raw = b'{"left_out": {"h1": {"counts": {"answers": 1, "words": 2}, "last": "x", "why": 7}}}'
    assert decode(raw, Health).left_out["h1"].summary == "1 answer, 2 words (last: x)"
