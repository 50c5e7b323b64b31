"""Every number, text and collection of a message is bounded, and values out of bounds are left out."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import msgspec
import pytest
from msgspec import inspect as mi
from support.auctions import announced, key, offer
from support.builders import ad, awarded, envelope
from support.logs import capture_logs
from support.strategies import message_types

from loom.bus.logs.discards import LINES, PERIOD_S, Discards
from loom.compat.reward_formulas import RewardBus
from loom.phases.adapt.calibration_writer import actual_complexity, recalibrated
from loom.phases.adapt.evidence import apply_reward
from loom.phases.adapt.retirement_policy import heir
from loom.phases.match.calls.offers import MAX_OFFER_BYTES, HostOffer, OfferReader
from loom.phases.match.ranked_bids import Awarded, decide
from loom.phases.match.scoring import AuctionContext
from loom.schemas.auction import MAX_TRUST, AnnouncedNode, Bid, HostAnnouncement, Offer
from loom.schemas.base import MAX_INT, MAX_SECONDS, Message, Undecodable, decode, encode
from loom.schemas.envelope import Envelope
from loom.schemas.errors import InvalidTask
from loom.schemas.events import TextDelta
from loom.schemas.learning.calibration import Calibration
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward
from loom.schemas.record import TaskRecord
from loom.schemas.run import RunEvent, read_events
from loom.schemas.task import RunResult, TaskAd, TaskError

HUGE = 10**400
INSIDE_A_PROCESS = ("loom.schemas.llm", "loom.schemas.config")
"""The port to a model and the settings of a process: neither is read from the bus."""
ON_THE_WIRE = [shape for shape in message_types() if shape.__module__ not in INSIDE_A_PROCESS]


def unbounded(kind: mi.Type, path: str) -> Iterator[str]:
    match kind:
        case mi.StrType(max_length=None, pattern=None) | mi.IntType(le=None) | mi.FloatType(le=None):
            yield path
        case mi.IntType(ge=None, gt=None) | mi.FloatType(ge=None, gt=None):
            yield path
        case mi.VarTupleType(item_type=item, max_length=most):
            if most is None:
                yield path
            yield from unbounded(item, f"{path}[]")
        case mi.DictType(value_type=value, max_length=most):
            if most is None:
                yield path
            yield from unbounded(value, f"{path}{{}}")
        case mi.UnionType(types=kinds):
            for one in kinds:
                yield from unbounded(one, path)


@pytest.mark.parametrize("shape", ON_THE_WIRE, ids=lambda shape: shape.__name__)
def test_everything_in_a_message_is_bounded(shape: type[Message]) -> None:
    info = mi.type_info(shape)
    assert isinstance(info, mi.StructType)
    assert [path for field in info.fields for path in unbounded(field.type, field.name)] == []


def with_number(message: Any, field: str, number: str) -> bytes:
    """The JSON of a message with a number in one of its fields that Python could not write there."""
    plain = {**msgspec.json.decode(encode(message)), field: "@"}
    return encode(plain).replace(b'"@"', number.encode())


RESULT = RunResult(content="x")
REWARD = Reward(
    reward_id="t:1:rules",
    task_id="t",
    attempt=1,
    node_id="n",
    domain_token="code",
    score=1.0,
    ended_at=1.0,
    estimated=0.5,
)
NUMBERS = [
    (RESULT, "prompt_tokens", "9" * 400),
    (RESULT, "completion_tokens", str(2**53)),
    (RESULT, "steps", "9" * 5000),
    (RESULT, "tool_errors", "-1"),
    (RESULT, "duration_s", "1e308"),
    (RESULT, "duration_s", "1e999"),
    (REWARD, "seconds", "1e308"),
    (REWARD, "tokens", "9" * 400),
    (REWARD, "attempt", str(2**64)),
    (REWARD, "ended_at", "1e300"),
    (REWARD, "ended_at", "-1"),
    (Bid(node_id="n"), "free", "9" * 400),
    (Bid(node_id="n"), "backlog", str(2**53)),
    (Bid(node_id="n"), "expected_s", "1e10"),
    (Bid(node_id="n"), "expected_tokens", "9" * 20),
    (HostAnnouncement(), "running", "9" * 400),
    (AnnouncedNode(node_id="n"), "slots", "9" * 400),
    (NodeProfile(node_id="n"), "seconds", "1.7e308"),
    (NodeProfile(node_id="n"), "last_seq", str(2**60)),
    (NodeProfile(node_id="n"), "updated_at", "1e300"),
    (Calibration(domain_token="code"), "last_seq", str(2**60)),
    (TaskError(code="x"), "retry_after_s", "1e300"),
]


@pytest.mark.parametrize(("message", "field", "number"), NUMBERS)
def test_a_number_out_of_bounds_is_undecodable(message: Message, field: str, number: str) -> None:
    with pytest.raises(Undecodable):
        decode(with_number(message, field, number), type(message))


def test_numbers_at_their_bounds_are_read() -> None:
    greatest = RunResult(prompt_tokens=MAX_INT, steps=MAX_INT, duration_s=MAX_SECONDS)
    assert decode(encode(greatest), RunResult) == greatest


def test_an_error_is_cut_to_what_a_message_holds() -> None:
    error = TaskError.of(InvalidTask("x" * 10_000, field="f" * 10_000))
    assert decode(encode(error), TaskError) == error


# -- sums and shares


def test_sums_of_a_profile_stop_at_their_bounds() -> None:
    profile = NodeProfile(node_id="n")
    for seq in range(1, 4):
        one = msgspec.structs.replace(REWARD, task_id=f"t{seq}", tokens=MAX_INT, seconds=MAX_SECONDS)
        profile = apply_reward(profile, one, seq)
    assert (profile.tokens, profile.seconds, profile.total_tasks) == (MAX_INT, MAX_SECONDS, 3)
    assert decode(encode(profile), NodeProfile) == profile


def test_tokens_of_a_result_stop_at_the_greatest_integer() -> None:
    assert RunResult(prompt_tokens=MAX_INT, completion_tokens=MAX_INT).tokens == MAX_INT


def test_a_huge_number_built_in_python_overflows_no_formula() -> None:
    huge = msgspec.structs.replace(REWARD, tokens=HUGE, seconds=MAX_SECONDS)
    assert actual_complexity(huge) == 1.0
    assert recalibrated(Calibration(domain_token="code"), huge, 1).count == 1
    assert RewardBus().compute_signal(TaskAd(), True, HUGE).efficiency == 0.0
    assert RewardBus().compute_signal(TaskAd(token_budget=HUGE), True, HUGE).efficiency == 0.0
    assert RewardBus().compute_signal(TaskAd(), True, -HUGE).efficiency == 1.0
    hosts = [announced("h", "a", running=HUGE)]
    assert heir(NodeProfile(node_id="b"), hosts, {}) == "a"


def test_a_huge_number_of_free_places_can_be_weighed() -> None:
    bid = Bid(node_id="n", free=HUGE, load=0.5)
    won = decide(envelope(ad(), now=0), [offer("h", [bid])], AuctionContext(recent_awards={("local", "h", "n"): 3}))
    assert isinstance(won, Awarded)
    assert 0.5 <= won.bid.load <= 1


def test_trust_is_bounded_where_it_is_written() -> None:
    from loom.phases.match.award_policies import Trust  # noqa: PLC0415 - of this test alone

    book = AuctionContext(policy=lambda _: Trust(1e300))
    won = decide(envelope(ad(), now=0), [offer("h", [Bid(node_id="n")])], book)
    assert isinstance(won, Awarded)
    assert won.award.bids[0].trust == MAX_TRUST
    env = awarded(envelope(ad(), now=0), bids_json=won.award.bids_json)
    assert decode(encode(env), Envelope) == env


# -- events and offers


@pytest.mark.parametrize("kind", ["result", "error"])
def test_a_last_event_that_cannot_be_read_ends_the_run_with_the_reason(kind: str) -> None:
    raw = b'{"seq":3,"kind":"%s","result":{"prompt_tokens":%s}}' % (kind.encode(), b"9" * 400)
    (alone,) = read_events(raw)
    assert (alone.kind, alone.final) == ("error", True)
    assert alone.error is not None
    assert (alone.error.code, "prompt_tokens" in alone.error.message) == ("agent_failed", True)
    delta = RunEvent(seq=2, kind="delta", event=TextDelta(text="x"))
    assert read_events(b"[" + encode(delta) + b"," + raw + b"]") == (delta, alone)


def test_other_events_that_cannot_be_read_are_left_out_and_reported() -> None:
    reasons: list[str] = []
    good = RunEvent(seq=1, kind="started")
    bad = b'{"seq":%s,"kind":"delta"}' % (b"9" * 400)
    beat = RunEvent(seq=0, kind="heartbeat")
    assert read_events(b"[" + bad + b"," + encode(good) + b"]", reasons.append) == (beat, good)
    assert len(reasons) == 1


def reader(limit: int = 16) -> tuple[Callable[[bytes], HostOffer | None], Discards]:
    discards = Discards()
    return partial(OfferReader(discards, limit).read, key("h")), discards


BAD_BIDS = {
    "free": b'{"node_id":"bad","free":%s}' % (b"9" * 400),
    "self_rating": b'{"node_id":"bad","self_rating":"high"}',
    "load": b'{"node_id":"bad","load":1e999}',
    "expected_s": b'{"node_id":"bad","expected_s":1e308}',
    "tools": b'{"node_id":"bad","tools":[1]}',
    "no object": b"7",
    "no name": b"{}",
}


@pytest.mark.parametrize("bad", BAD_BIDS.values(), ids=BAD_BIDS)
def test_a_bid_that_cannot_be_read_leaves_the_other_bids_of_its_host(bad: bytes) -> None:
    read, discards = reader()
    offer = read(b'{"bids":[{"node_id":"a"},%s,{"node_id":"b"}]}' % bad)
    assert offer is not None
    assert [bid.node_id for bid in offer.bids] == ["a", "b"]
    assert discards.counts["bid_undecodable"] == 1


def test_as_many_bids_as_were_asked_for_are_read_and_one_offer_of_each_host() -> None:
    read, discards = reader(limit=2)
    many = Offer(bids=tuple(Bid(node_id=f"n{n}") for n in range(5)))
    first = read(encode(many))
    assert first is not None
    assert [bid.node_id for bid in first.bids] == ["n0", "n1"]
    assert discards.counts["bids_discarded"] == 1
    assert read(encode(many)) is None
    assert discards.hosts["h"].counts == {"bids": 1, "offers": 1}
    assert "already" in discards.hosts["h"].last


def test_a_giant_offer_is_left_out_before_it_is_decoded() -> None:
    read, discards = reader()
    assert read(b" " * MAX_OFFER_BYTES + b'{"host_id":"h"}') is None
    assert f"at most {MAX_OFFER_BYTES}" in discards.hosts["h"].last


# -- counting


def test_a_flood_is_counted_whole_and_logged_in_part() -> None:
    now = 0.0
    discards = Discards(lambda: now)
    with capture_logs() as logs:
        for _ in range(1000):
            discards.add("reward_undecodable", reason="x")
        assert len(logs) == LINES
        now = PERIOD_S
        discards.add("reward_undecodable", reason="x")
    assert logs[-1]["total"] == discards.counts["reward_undecodable"] == 1001
    assert len(logs) == LINES + 1


def test_a_record_of_the_longest_texts_fits_its_bounds() -> None:
    tools = tuple("t" * 64 for _ in range(32))
    env = awarded(envelope(ad(description="d" * 20_000, required_tools=tools), now=0))
    record = TaskRecord(task_id=env.task_id, state="running", envelope=env, admitted_at=1.0)
    assert decode(encode(record), TaskRecord) == record
