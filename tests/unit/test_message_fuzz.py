"""Any message raises at most a LoomError, in every decoder and in the pure code behind it."""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any

import msgspec
import msgspec.inspect as mi
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loom.bus.dead_letters.write import letter_facts
from loom.bus.host_directory import AnnouncedHost, HostKey
from loom.bus.logs.discards import Discards
from loom.bus.natsio.publishing import read_reply
from loom.bus.natsio.stored_message import StoredMessage
from loom.bus.natsio.transport.message import Msg
from loom.bus.stored_rewards import reward_in
from loom.bus.subjects import Subjects
from loom.phases.adapt.calibration_writer import recalibrated
from loom.phases.adapt.evidence import apply_reward, newest_time, summary
from loom.phases.adapt.retirement_policy import due_retirements, heir, inherited_rewards
from loom.phases.evaluate import retry_policy as evaluate
from loom.phases.evaluate import rewards
from loom.phases.execute.delegation import delegated_envelope, result_for_run
from loom.phases.execute.run_messages import error_of, request_for, with_result
from loom.phases.match.award_policies import POLICIES
from loom.phases.match.calls.offers import OfferReader
from loom.phases.match.partial_decoding import to_profile
from loom.phases.match.ranked_bids import Awarded, decide
from loom.phases.match.scoring import AuctionContext
from loom.phases.scale import planner, subtask_graph
from loom.phases.sense.calibration_reader import calibrated
from loom.phases.sense.estimate import estimate_task
from loom.schemas.auction import (
    BID_LIMIT,
    CallForBids,
    HostAnnouncement,
    Offer,
    RetireReply,
    RetireRequest,
    SpawnReply,
    SpawnRequest,
)
from loom.schemas.base import MAX_INT, MAX_MESSAGE_BYTES, Undecodable, decode, encode
from loom.schemas.checks.ad import check_ad, parse_ad
from loom.schemas.config import ClusterConfig
from loom.schemas.dead_letter import DeadLetter
from loom.schemas.envelope import Envelope
from loom.schemas.errors import LoomError
from loom.schemas.events import Done, ErrorEvent, SubtaskEvent
from loom.schemas.learning.calibration import Calibration
from loom.schemas.learning.lease import Lease
from loom.schemas.learning.lifecycle import Lifecycle
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward
from loom.schemas.learning.summary import ProfileSummary
from loom.schemas.plan import SplitPlan, Subtask, parse_plan
from loom.schemas.record import TaskRecord
from loom.schemas.run import Delta, RunEvent, RunRequest, read_events
from loom.schemas.task import Accepted, ErrorReply, Submission, TaskAd, TaskResult

SHAPES: tuple[Any, ...] = (
    *(
        TaskAd,
        Submission,
        TaskResult,
        Accepted,
        ErrorReply,
        RunRequest,
        RunEvent,
        Delta,
        SubtaskEvent,
        Done,
        ErrorEvent,
    ),
    *(CallForBids, Offer, HostAnnouncement, SpawnRequest, SpawnReply, RetireRequest, RetireReply),
    *(Reward, NodeProfile, Calibration, Lease, Lifecycle, Envelope, TaskRecord, SplitPlan, DeadLetter),
)
CONFIG = ClusterConfig()

INTS = ("0", "1", "-1", "2147483648", str(MAX_INT), str(MAX_INT + 1), "18446744073709551616", "9" * 400, "9" * 4400)
FLOATS = (
    "0.0",
    "1.0",
    "-0.0",
    "5e-324",
    "1e-300",
    "1e308",
    "1e309",
    "-1e308",
    "1e9",
    "1e11",
    "NaN",
    "0.30000000000000004",
)
TEXTS = ('""', '"a.b"', '">"', '"\\u0000"', '"\\ud800"', '"\\u202e"', f'"{"x" * 65}"', f'"{"y" * 3000}"', '"inherit:x"')
WORDS = ('"a"', '"b"', '"good-1"', '"code"')
DEEP = "[" * 3000


class Forger:
    """Writes JSON of any shape, mostly fitting, with odd values among them.

    Args:
        odd: Share of odd values.
    """

    def __init__(self, seed: int, odd: float) -> None:
        self.dice = Random(seed)
        self.odd = odd

    def body(self, shape: Any) -> bytes:
        text = self._of(mi.type_info(shape))
        if self.dice.random() < self.odd / 2:
            at = self.dice.randrange(len(text))
            text = text[:at] + self.dice.choice(["", "9" * 30, "e400", DEEP, '"', "null", "\x00"]) + text[at + 1 :]
        return text.encode()

    def made(self, shape: Any, read: Callable[[bytes], Any] | None = None) -> Any:
        """Return a decodable message, or None without one."""
        for _ in range(8):
            try:
                return (read or (lambda raw: decode(raw, shape)))(self.body(shape))
            except Undecodable:
                continue
        return None

    def _of(self, shape: mi.Type) -> str:  # noqa: C901, PLR0911 - a case for each kind of type
        odd = self.dice.random() < self.odd
        match shape:
            case mi.Metadata():
                return self._of(shape.type)
            case mi.IntType():
                return self.dice.choice(INTS) if odd else str(self.dice.randint(0, 20))
            case mi.FloatType():
                return self.dice.choice(FLOATS) if odd else repr(self.dice.random())
            case mi.StrType():
                return self.dice.choice(TEXTS if odd else WORDS)
            case mi.BoolType():
                return self.dice.choice(["true", "false"])
            case mi.LiteralType():
                return json.dumps(self.dice.choice(shape.values))
            case mi.UnionType():
                return self._of(self.dice.choice(shape.types))
            case mi.CollectionType():
                return f"[{', '.join(self._of(shape.item_type) for _ in range(self.dice.choice([0, 1, 2, 5])))}]"
            case mi.DictType():
                pairs = (
                    f"{self._of(mi.StrType())}: {self._of(shape.value_type)}"
                    for _ in range(self.dice.choice([0, 1, 3]))
                )
                return f"{{{', '.join(pairs)}}}"
            case mi.StructType():
                return self._struct(shape)
            case mi.AnyType():
                return self.dice.choice(
                    ["1", '"x"', "null", "[[]]", '{"plan": true}', "9" * 400, "1e308", DEEP if odd else "[]"]
                )
        return "null"

    def _struct(self, shape: mi.StructType) -> str:
        fields = [field for field in shape.fields if field.required or self.dice.random() < 0.5]
        if shape.array_like:
            return f"[{', '.join(self._of(field.type) for field in shape.fields[: self.dice.randint(3, 4)])}]"
        pairs = [
            f'"{field.encode_name}": {self._of(field.type)}' for field in fields if self.dice.random() > self.odd / 4
        ]
        if shape.tag is not None:
            pairs.append(f'"{shape.tag_field}": {json.dumps(shape.tag)}')
        return f"{{{', '.join(pairs)}}}"


def any_message(forger: Forger) -> None:
    shape = forger.dice.choice(SHAPES)
    message = decode(forger.body(shape), shape)
    assert decode(encode(message), shape, limit=2 * MAX_MESSAGE_BYTES) == message


def ads(forger: Forger) -> None:
    ad = parse_ad(forger.body(TaskAd))
    spec, _ = estimate_task(ad)
    calibrated(spec, {"code": Calibration(domain_token="code", bias=1.0, count=9)})
    check_ad(ad)
    planner.plan_from_ad(ad, CONFIG)


def events(forger: Forger) -> None:
    parts = [forger.body(RunEvent) for _ in range(forger.dice.randint(0, 4))]
    for event in read_events(b"[" + b",".join(parts) + b"]" if forger.dice.random() < 0.6 else forger.body(RunEvent)):
        decode(encode(event), RunEvent)


def auctions(forger: Forger) -> None:
    envelope, reader = forger.made(Envelope), OfferReader(Discards(), BID_LIMIT)
    reads = [partial(reader.read, HostKey("local", f"h{number}")) for number in range(3)]
    offers = [offer for read in reads if (offer := forger.made(Offer, read)) is not None]
    summary = forger.made(ProfileSummary)
    profiles = {} if summary is None else {summary.name: to_profile(summary, (), None)}
    if envelope is None or envelope.spec is None:
        return
    taken = {(*offer.host, bid.node_id): forger.dice.choice([1, 5]) for offer in offers for bid in offer.bids}
    for policy in POLICIES.values():
        verdict = decide(
            envelope,
            offers,
            AuctionContext(policy=policy, profiles=profiles, now=1e9, half_life_s=1e6, recent_awards=taken),
        )
        if isinstance(verdict, Awarded):
            decode(
                encode(msgspec.structs.replace(envelope, award=verdict.award)), Envelope, limit=2 * MAX_MESSAGE_BYTES
            )


def learning(forger: Forger) -> None:
    profile = forger.made(NodeProfile) or NodeProfile(node_id="good-1")
    calibration = forger.made(Calibration) or Calibration(domain_token="code")
    subjects, discards = Subjects("loom"), Discards()
    for seq in range(profile.last_seq + 1, profile.last_seq + 9):
        body = forger.body(Reward)
        reward = reward_in(StoredMessage("loom.reward.rules.local.good-1.code", body, {}, seq, 1.0), subjects, discards)
        reward = reward or forger.made(Reward)
        if reward is not None:
            profile = apply_reward(profile, reward, seq, forget=True)
            calibration = recalibrated(calibration, reward, seq)
    newest_time(profile)
    decode(encode(calibration), Calibration)
    for one in (profile, summary(profile)):
        decode(encode(one), NodeProfile)
    for inherited in inherited_rewards(profile, "acme", "heir"):
        decode(encode(inherited), Reward)


def judging(forger: Forger) -> None:
    envelope, record = forger.made(Envelope), forger.made(TaskRecord)
    if envelope is not None:
        decision = evaluate.decide(envelope, CONFIG, 1.0)
        decode(encode(decision.envelope), Envelope, limit=2 * MAX_MESSAGE_BYTES)
        if (reward := rewards.reward_for(envelope, envelope.error, 1.0)) is not None:
            decode(encode(reward), Reward)
    if record is not None:
        decode(encode(record.to_result()), TaskResult)
        decode(encode(result_for_run(record)), TaskResult)
        for implied in rewards.implied_rewards(record):
            decode(encode(implied), Reward)
        evaluate.notice_of(record)


def running(forger: Forger) -> None:
    envelope, event = forger.made(Envelope), forger.made(RunEvent)
    if envelope is None or event is None:
        return
    decode(encode(with_result(envelope, event.result)), Envelope, limit=2 * MAX_MESSAGE_BYTES)
    if envelope.award is not None:
        error_of(event, envelope.award)
        encode(request_for(envelope, envelope.award, 1.0))
    if event.ad is not None:
        delegated_envelope(envelope, event.ad, CONFIG)


def plans(forger: Forger) -> None:
    plan, record = forger.made(SplitPlan), forger.made(TaskRecord)
    if plan is not None and record is not None:
        noted = subtask_graph.record_child(plan, record)
        decode(encode(noted), SplitPlan, limit=2 * MAX_MESSAGE_BYTES)
        subtask_graph.plan_error(noted)
        for part in subtask_graph.running_subtasks(noted)[:2]:
            encode(subtask_graph.child_envelope(noted, part, {}, 1.0))
        encode(subtask_graph.synthesis_envelope(noted, {}))
    parse_plan(forger.body(list[Subtask]).decode())


def hosts(forger: Forger) -> None:
    there = [host for host in (forger.made(AnnouncedHost) for _ in range(3)) if host is not None]
    profile = forger.made(NodeProfile)
    profiles = {profile.key: profile} if profile is not None else {}
    due_retirements(there, profiles, CONFIG)
    heir(profile or NodeProfile(node_id="a"), there, profiles)


class Ack(msgspec.Struct):
    """The answer of a server to a stored message."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: dict[str, int] | None = None


def acknowledgements(forger: Forger) -> None:
    body = forger.body(Ack)
    read_reply(Msg("_INBOX.x", "", forger.dice.choice([body, body + b"\xff", body[:-1], DEEP.encode()]), b""))


def dead_letters(forger: Forger) -> None:
    names = [f"Loom-Dead-{name.replace('_', '-')}" for name in DeadLetter.__struct_fields__]
    letter_facts({name: forger.body(str).decode().strip('"') for name in names}, "loom.dead.match.t1")


TARGETS = (
    *(any_message, ads, events, auctions, learning, judging, running, plans, hosts, acknowledgements, dead_letters),
)


@pytest.mark.parametrize("target", TARGETS, ids=[target.__name__ for target in TARGETS])
@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(seed=st.integers(0, 2**32), odd=st.sampled_from([0.02, 0.1, 0.3]))
def test_any_message_leads_to_loom_errors_only(target: Callable[[Forger], None], seed: int, odd: float) -> None:
    with suppress(LoomError):  # a message that is refused
        target(Forger(seed, odd))


@pytest.mark.parametrize("count", [0, 1, 2**53 - 1])
def test_a_stored_profile_with_inconsistent_counts_continues_to_learn(count: int) -> None:
    scores = [[f"t{n}:1", 1.0, float(n)] for n in range(4)]
    stored = {"node_id": "n", "domains": {"code": {"scores": scores, "count": count, "mean": 1.0}}}
    reward = Reward(
        reward_id="t9:1:rules", task_id="t9", attempt=1, node_id="n", domain_token="data", score=1.0, ended_at=9.0
    )

    folded = apply_reward(decode(encode(stored), NodeProfile), reward, 1)

    assert (folded.success_rate, folded.total_tasks) == (1.0, 1)
