"""The tasks of one call are decided like tasks of calls of their own."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.auctions import offer
from support.builders import ad, envelope

from loom.phases.match.award_policies import POLICIES, SAME_FOR_ALL_TASKS, BidderStats
from loom.phases.match.calls.offers import HostOffer
from loom.phases.match.newcomers import Newcomers
from loom.phases.match.ranked_bids import Awarded, JointAuction, decide
from loom.phases.match.scoring import AuctionContext
from loom.schemas.auction import Bid
from loom.schemas.envelope import Envelope, FailedAttempt
from loom.schemas.identity import qualified
from loom.schemas.learning.profile import DomainEvidence, NodeProfile, Score
from loom.schemas.task import PRIORITIES

OWNERS = ("local", "acme")
UNITS = st.sampled_from([0.0, 0.25, 0.5, 1.0])


@st.composite
def bids(draw: st.DrawFn, host: int) -> tuple[Bid, ...]:
    return tuple(
        Bid(
            node_id=f"n{host}-{number}",
            self_rating=draw(UNITS),
            load=draw(UNITS),
            free=draw(st.none() | st.integers(0, 3)),
            tasks=draw(st.sampled_from([None, None, None, ("t0", "t2")])),
        )
        for number in range(draw(st.integers(0, 4)))
    )


@st.composite
def offers(draw: st.DrawFn) -> list[HostOffer]:
    return [offer(f"h{n}", draw(bids(n)), owner=draw(st.sampled_from(OWNERS))) for n in range(draw(st.integers(1, 4)))]


def evidence(count: int, mean: float) -> DomainEvidence:
    return DomainEvidence(scores=(Score(attempt_id="r", score=mean, ended_at=0),), count=count, mean=mean)


class Recorder:
    """Counts awards as MATCH does, and gives an auction live views of the counts."""

    def __init__(self, profiles: dict[str, NodeProfile], policy: str) -> None:
        self.recent: Counter[tuple[str, str, str]] = Counter()
        self.pending: Counter[tuple[str, str]] = Counter()
        newcomers = Newcomers()
        for node, profile in profiles.items():
            newcomers.update(node, profile.domains)
        self.context = AuctionContext(
            profiles,
            POLICIES[policy],
            policy,
            recent_awards=self.recent,
            pending_awards=self.pending,
            newcomers=newcomers,
        )

    def record(self, result: Any) -> Any:
        if isinstance(result, Awarded):
            award = result.award
            self.recent[award.owner, award.host_id, award.node_id] += 1
            self.pending[award.node, "code"] += 1
        return result


def tasks(count: int, priority: str, failed: int) -> list[Envelope]:
    attempt = FailedAttempt(attempt=1, node_id="n0-0", owner="acme", host_id="h0", code="agent_failed")
    return [
        envelope(ad(task_id=f"t{n}", priority=priority), now=0, failed_attempts=(attempt,) if n == failed else ())
        for n in range(count)
    ]


@given(
    offers(),
    st.dictionaries(st.integers(0, 3), st.tuples(st.integers(1, 9), UNITS), max_size=4),
    st.sampled_from(list(POLICIES)),
    st.sampled_from(PRIORITIES),
    st.integers(0, 6),
)
def test_a_task_of_a_joint_call_gets_the_award_of_a_call_of_its_own(
    made: list[HostOffer], known: dict[int, tuple[int, float]], policy: str, priority: str, failed: int
) -> None:
    profiles = {
        qualified(made[host].owner, f"n{host}-0"): NodeProfile(
            node_id=f"n{host}-0", owner=made[host].owner, last_seq=host, domains={"code": evidence(count, mean)}
        )
        for host, (count, mean) in known.items()
        if host < len(made)
    }
    alone, joint = Recorder(profiles, policy), Recorder(profiles, policy)
    auction = JointAuction(made, joint.context)
    for task in tasks(6, priority, failed):
        own = [
            HostOffer(owner=o.owner, host_id=o.host_id, bids=tuple(b for b in o.bids if b.is_for(task.task_id)))
            for o in made
        ]
        expected = alone.record(decide(task, own, alone.context))
        result = joint.record(auction.decide(task, made))
        assert result == expected
        if isinstance(result, Awarded):
            assert result.award.bids == expected.award.bids
            auction.record(result.award)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_policy_shared_by_tasks_does_not_look_at_the_task(policy: str) -> None:
    def trust(task_id: str, attempt: int) -> float:
        stats = BidderStats(task_id, attempt, "n1", 0.5, 0.5, 3, 9)
        return POLICIES[policy](stats).value

    alike = len({trust(f"t{n}", n) for n in range(1, 9)}) == 1
    assert alike is (POLICIES[policy] in SAME_FOR_ALL_TASKS)


def test_slots_of_a_node_are_awarded_once_each() -> None:
    recorder = Recorder({}, "ucb")
    auction = JointAuction(
        [offer("h1", [Bid(node_id="n1", free=2)]), offer("h2", [Bid(node_id="n2", free=1)])], recorder.context
    )
    winners = []
    for task in tasks(4, "normal", -1):
        result = recorder.record(auction.decide(task, auction.offers))
        winners.append(result.award.node_id if isinstance(result, Awarded) else type(result).__name__)
        if isinstance(result, Awarded):
            auction.record(result.award)
    assert sorted(winners) == ["AllBusy", "n1", "n1", "n2"]
    assert winners[-1] == "AllBusy"


def test_equal_bids_share_the_tasks_of_a_call() -> None:
    recorder = Recorder({}, "greedy")
    auction = JointAuction([offer("h", [Bid(node_id=f"n{n}") for n in range(4)])], recorder.context)
    winners = {auction.decide(task, auction.offers).award.node_id for task in tasks(40, "normal", -1)}  # type: ignore[union-attr]
    assert winners == {"n0", "n1", "n2", "n3"}
