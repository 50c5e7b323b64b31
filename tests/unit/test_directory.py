"""The hosts MATCH waits for, and its knowledge of their nodes, without a bus."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.auctions import key, nodes, offer
from support.evidence import rewards_in
from support.strategies import messages

from loom.bus.bus import Bus
from loom.bus.host_directory import ALIVE_S
from loom.bus.natsio.kv import Entry
from loom.bus.natsio.transport.message import Msg
from loom.phases.adapt.evidence import losses_in
from loom.phases.adapt.summary_writer import summary_of
from loom.phases.match.calls.offers import UncheckedOffer
from loom.phases.match.directory import HostDirectory
from loom.schemas.auction import AnnouncedNode, HostAnnouncement, Offer
from loom.schemas.base import Undecodable, decode, encode
from loom.schemas.learning.profile import DomainEvidence, NodeProfile, Score
from loom.schemas.learning.summary import ProfileSummary


class Clock:
    """The time, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def summary_with_attempts(profile: NodeProfile) -> ProfileSummary:
    """Return the summary of a profile that names every attempt of the windows."""
    return summary_of(profile, rewards=rewards_in(profile))


class Changes:
    """A reader of a bucket with one batch."""

    def __init__(self, profiles: Iterable[Any]) -> None:
        summaries = [decode(encode(summary_with_attempts(profile)), ProfileSummary) for profile in profiles]
        self._entries = [Entry(summary.key, summary, 1) for summary in summaries]

    async def batch(self) -> list[Entry[ProfileSummary]]:
        return self._entries


async def learn(roster: HostDirectory, *profiles: Any) -> None:
    await roster._read_batch(Changes(profiles))  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("loom.phases.match.directory.time", clock)
    return clock


@pytest.fixture
async def roster(clock: Clock) -> HostDirectory:
    return HostDirectory(Bus("nats://127.0.0.1:1"))


def announce(roster: HostDirectory, host: str, *node_ids: str, owner: str = "local", **facts: Any) -> None:
    body = encode(HostAnnouncement(nodes=nodes(*node_ids), **facts))
    roster._on_announcement(Msg(f"loom.host.{owner}.{host}", data=body))


# -- the hosts to wait for


async def test_a_host_is_awaited_until_it_has_been_silent_for_too_long(roster: HostDirectory, clock: Clock) -> None:
    announce(roster, "h1", "n1")
    clock.now += ALIVE_S / 2
    announce(roster, "h2", "n2")
    assert roster.awaited_hosts() == {key("h1"), key("h2")}
    clock.now += ALIVE_S / 2 + 1
    assert roster.awaited_hosts() == {key("h2")}
    announce(roster, "h1", "n1")
    assert roster.awaited_hosts() == {key("h1"), key("h2")}
    clock.now += ALIVE_S + 1
    assert roster.awaited_hosts() == set()


async def test_a_late_answer_proves_a_present_host_and_no_other(roster: HostDirectory) -> None:
    announce(roster, "h1", "n1")
    announce(roster, "h2", "n2")
    roster.record_late_answer(key("h1"))
    announce(roster, "h2", "n2", draining=True, seq=2)
    roster.record_late_answer(key("h2"))
    assert roster.awaited_hosts() == {key("h1")}


async def test_an_answer_is_a_sign_of_life_unless_its_host_is_leaving(roster: HostDirectory, clock: Clock) -> None:
    announce(roster, "h1")
    announce(roster, "h2")
    clock.now += ALIVE_S - 1
    roster.record_answers([offer("h1"), offer("h2", decline="draining"), offer("new")], set())
    clock.now += 2
    assert roster.awaited_hosts() == {key("h1"), key("new")}


async def test_a_host_that_announces_its_drain_is_not_awaited_any_more(roster: HostDirectory) -> None:
    announce(roster, "h1", "n1")
    assert roster.host_of("n1") == key("h1")
    announce(roster, "h1", draining=True)
    assert roster.awaited_hosts() == set()
    assert roster.host_of("n1") is None


async def test_hosts_of_two_owners_may_share_an_id_and_stay_separate(roster: HostDirectory) -> None:
    announce(roster, "h1", "n1")
    announce(roster, "h1", "n1", owner="acme")
    assert roster.awaited_hosts() == {key("h1"), key("h1", "acme")}
    assert (roster.host_of("n1"), roster.host_of("acme.n1")) == (key("h1"), key("h1", "acme"))
    announce(roster, "h1", owner="acme", draining=True)
    assert (roster.awaited_hosts(), roster.host_of("n1"), roster.host_of("acme.n1")) == ({key("h1")}, key("h1"), None)


async def test_an_overtaken_announcement_is_ignored_until_its_host_restarts(
    roster: HostDirectory, clock: Clock
) -> None:
    announce(roster, "h1", "n1", seq=7)
    announce(roster, "h1", "n1", seq=9, draining=True)
    announce(roster, "h1", "n1", seq=8)
    assert roster.host_of("n1") is None
    clock.now += ALIVE_S
    announce(roster, "h1", "n1", seq=1)
    assert roster.host_of("n1") == key("h1")


async def test_a_host_of_plain_nodes_alone_is_listed_and_not_awaited(roster: HostDirectory) -> None:
    plain = HostAnnouncement(nodes=(AnnouncedNode(node_id="sh", plain=True),))
    roster._on_announcement(Msg("loom.host.local.p1", data=encode(plain)))
    assert (roster.awaited_hosts(), roster.only_plain, roster.host_of("sh")) == (set(), True, key("p1"))
    announce(roster, "h1", "n1")
    assert (roster.awaited_hosts(), roster.only_plain) == ({key("h1")}, False)
    both = HostAnnouncement(nodes=(*plain.nodes, AnnouncedNode(node_id="n2")))
    roster._on_announcement(Msg("loom.host.local.p1", data=encode(both)))
    roster.record_answers([offer("h1")], set())
    assert roster.awaited_hosts() >= {key("h1")}
    assert not roster.only_plain


async def test_nodes_that_were_not_known_are_noticed_once(roster: HostDirectory) -> None:
    for announcement in ("n1", "n2"):
        before = roster.node_added
        announce(roster, "h1", announcement)
        assert before.is_set()
        before = roster.node_added
        announce(roster, "h1", announcement)
        assert not before.is_set()


async def test_the_names_of_made_up_nodes_are_bounded(roster: HostDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loom.phases.match.directory.MAX_NODES", 10)
    announce(roster, "good", "n1")
    roster.record_answers([offer("good")], set())
    for number in range(20):
        announce(roster, f"h{number}", *(f"n{number}-{n}" for n in range(4)))
    assert roster._ownership.size <= 10
    assert roster.host_of("n1") == key("good")


# -- what is known


def evidence(*scores: float, task: str = "t") -> DomainEvidence:
    window = tuple(Score(attempt_id=f"{task}{n}:1", score=score, ended_at=n) for n, score in enumerate(scores))
    return DomainEvidence(scores=window, count=len(scores), mean=sum(scores) / max(1, len(scores)))


@given(st.lists(messages(NodeProfile), max_size=4))
async def test_profiles_of_adapt_are_known_with_counts_means_and_newest_time(
    profiles: Sequence[NodeProfile],
) -> None:
    roster = HostDirectory(Bus("nats://127.0.0.1:1"))
    for profile in profiles:
        await learn(roster, profile)
    for node, known in roster.profiles.items():
        whole = next(profile for profile in reversed(profiles) if profile.name == node)
        assert known.last_seq == whole.last_seq
        assert known.domains == {
            token: DomainEvidence(
                scores=(Score(attempt_id="", score=one.mean, ended_at=newest_at(one)),) if newest_at(one) else (),
                count=one.count,
                mean=one.mean,
                losses=losses_in(one),
            )
            for token, one in whole.domains.items()
        }


def newest_at(evidence: DomainEvidence) -> float:
    return evidence.scores[-1].ended_at if evidence.scores else 0.0


async def test_the_best_known_follow_the_profiles(roster: HostDirectory) -> None:
    await learn(roster, NodeProfile(node_id="n1", domains={"code": evidence(1, 0)}))
    await learn(roster, NodeProfile(node_id="n2", domains={"code": evidence(1, 1)}))
    assert roster.ranking.best("code", 16) == ("n2", "n1")
    await learn(roster, NodeProfile(node_id="n2", domains={"data": evidence(1)}))
    assert roster.ranking.best("code", 16) == ("n1",)


async def test_only_changed_domains_are_reported_and_only_their_last_change() -> None:
    reports: list[tuple[str, str, list[str]]] = []
    roster = HostDirectory(
        Bus("nats://127.0.0.1:1"),
        on_rewarded=lambda node, domain_token, ids: reports.append((node, domain_token, list(ids))),
    )
    code, data = evidence(1, 0), evidence(1, task="d")
    await learn(roster, NodeProfile(node_id="n1", domains={"code": code, "data": data}))
    assert reports == [("n1", "code", ["t0:1", "t1:1"]), ("n1", "data", ["d0:1"])]
    reports.clear()
    known = roster.profiles["n1"].domains
    later = [
        NodeProfile(node_id="n1", domains={"code": evidence(*scores), "data": data}) for scores in ([1], [1, 0, 1])
    ]
    await learn(roster, *later)
    assert reports == [("n1", "code", ["t0:1", "t1:1", "t2:1"])]
    assert roster.profiles["n1"].domains["data"] is known["data"]
    assert roster.profiles["n1"].domains["code"].mean == pytest.approx(2 / 3)


# -- what is read of offers


@given(messages(Offer))
def test_an_offer_is_read_as_it_was_written(offer: Offer) -> None:
    assert encode(decode(encode(offer), UncheckedOffer)) == encode(offer)


@pytest.mark.parametrize(
    "odd", [{"load": 2}, {"self_rating": -1}, {"expected_s": -1}, {"load": "0"}, {"node_id": "a b"}]
)
def test_an_offer_beyond_its_ranges_is_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(Undecodable):
        decode(json.dumps({"bids": [{"node_id": "n", **odd}]}).encode(), UncheckedOffer)


def test_a_number_that_no_float_can_hold_is_refused() -> None:
    with pytest.raises(Undecodable):
        decode(b'{"bids": [{"node_id": "n", "expected_s": 1e999}]}', UncheckedOffer)
