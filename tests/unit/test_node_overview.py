import pytest
from support.auctions import announced

from loom.phases.adapt.evidence import apply_reward
from loom.runner.cli.views.node_tables import load_of
from loom.runner.node_overview import Auctioned, auctioned, overviews, standing_of
from loom.schemas.auction import Award, ScoredBid, bids_json
from loom.schemas.base import encode
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Envelope
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward
from loom.schemas.record import TaskRecord
from loom.schemas.task import TaskAd
from loom.schemas.tokens import domain_token


def folded(*scores: float) -> NodeProfile:
    profile = NodeProfile(node_id="n")
    for seq, score in enumerate(scores, start=1):
        one = Reward(
            reward_id=f"t{seq}:1:rules",
            task_id=f"t{seq}",
            attempt=1,
            node_id="n",
            domain_token="code",
            score=score,
            ended_at=1000.0 + seq,
        )
        profile = apply_reward(profile, one, seq, forget=True)
    return profile


@pytest.mark.parametrize(
    ("rewards", "standing"),
    [
        ((), "new"),
        ((1.0,), "unproven"),
        ((0.0, 0.0), "unproven"),
        ((0.0, 0.0, 0.0), "failing"),
        ((1.0, 1.0, 0.0), "unproven"),
        ((1.0,) * 10, "healthy"),
        ((0.0,) * 10, "failing"),
        ((1.0,) * 100 + (0.0,) * 7, "failing"),
    ],
)
def test_new_little_known_and_failing_nodes_are_distinguished(rewards: tuple[float, ...], standing: str) -> None:
    assert standing_of(folded(*rewards) if rewards else None, ClusterConfig(apoptosis_threshold=0.35)) == standing


def test_live_nodes_come_first_with_their_evidence() -> None:
    host = announced("h", "b", "c", running=2, queued=3)
    profiles = [NodeProfile(node_id="a", total_tasks=3), NodeProfile(node_id="c")]
    seen = Auctioned({("b", "code"): 0.9, ("gone", "code"): 0.1}, {})

    known = overviews([host], profiles, seen, ClusterConfig())

    assert [(node.node_id, node.alive, node.profile is not None) for node in known] == [
        ("b", True, False),
        ("c", True, True),
        ("a", False, True),
    ]
    assert [(each.domain, each.self_rating, each.evidence.count) for each in known[0].domains.values()] == [
        ("code", 0.9, 0)
    ]
    assert load_of(host) == "2/2+3"


def recorded(task_id: str, domain: str, claim: float) -> TaskRecord:
    bid = ScoredBid(node_id="a", host_id="h", score=1.0, self_rating=claim, trust=1.0, load=0.0, tools=1.0)
    envelope = Envelope(
        ad=TaskAd(task_id=task_id, domain=domain, description="x"),
        deadline=1.0,
        award=Award(node_id="a", host_id="h", bids_json=bids_json([encode(bid)])),
    )
    return TaskRecord(task_id=task_id, state="running", envelope=envelope, admitted_at=1.0)


def test_the_newest_self_rating_counts_and_domains_are_shown_as_worded() -> None:
    seen = auctioned([recorded("new", "Data Science", 0.7), recorded("old", "data science", 0.2)])
    [node] = overviews([announced("h", "a")], [], seen, ClusterConfig())

    token = domain_token("data science")
    assert seen.self_ratings == {("a", token): 0.7}
    assert node.domains[token].domain == "Data Science"
