from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.auctions import nodes as announced_nodes

from loom.bus.host_directory import AnnouncedHost
from loom.phases.adapt.evidence import apply_reward
from loom.phases.adapt.retirement_policy import due_retirements, heir, inherited_rewards, staying
from loom.phases.shared.node_health import health
from loom.schemas.auction import ChildState
from loom.schemas.config import ClusterConfig
from loom.schemas.learning.profile import WINDOW, DomainEvidence, NodeProfile, Score
from loom.schemas.learning.reward import Reward

CONFIG = ClusterConfig(idle_timeout_s=60, min_nodes=1)
OLD = {"age_s": 1000.0}


def child(node_id: str = "a-c1", **facts: Any) -> ChildState:
    return ChildState(node_id=node_id, parent_id="a", **{**OLD, **facts})


def host(*children: ChildState, nodes: tuple[str, ...] = ("a",), **facts: Any) -> AnnouncedHost:
    names = (*nodes, *(one.node_id for one in children))
    about = {"host_id": "h1", "nodes": announced_nodes(*names, slots=8), "spawned": children, **facts}
    return AnnouncedHost(**about)


def profile(node_id: str, losses: int = 0, **domains: list[float]) -> NodeProfile:
    """A profile with these scores, oldest first, by domain."""
    known = {
        domain_token: DomainEvidence(
            scores=tuple(
                Score(attempt_id=f"{domain_token}{n}:1", score=x, ended_at=float(n)) for n, x in enumerate(each)
            ),
            count=len(each),
            mean=sum(each) / len(each),
        )
        for domain_token, each in domains.items()
    }
    return NodeProfile(node_id=node_id, domains=known, consecutive_losses=losses)


def profiles(*known: NodeProfile) -> dict[str, NodeProfile]:
    return {one.key: one for one in known}


def goes(*hosts: AnnouncedHost, config: ClusterConfig = CONFIG, known: tuple[NodeProfile, ...] = ()) -> list[str]:
    return [one.node_id for one in due_retirements(hosts, profiles(*known), config)]


# -- who retires


def test_a_child_idle_for_long_enough_retires_if_it_is_idle_still() -> None:
    [one] = due_retirements([host(child(idle_s=61))], {}, CONFIG)
    assert (one.host, one.node_id, one.when_idle) == (("local", "h1"), "a-c1", True)
    assert one.reason == "idle for 61 s"
    assert goes(host(child(idle_s=59))) == []


def test_the_longest_idle_goes_first_and_the_failing_before_them() -> None:
    crowd = host(child("a-c1", idle_s=70), child("a-c2", idle_s=90), child("a-c3"))
    assert goes(crowd, known=(profile("a-c3", losses=20),)) == ["a-c3", "a-c2", "a-c1"]


def test_a_working_child_is_not_idle_even_without_any_patience() -> None:
    assert goes(host(child(idle_s=0)), config=ClusterConfig(idle_timeout_s=0)) == []


@pytest.mark.parametrize(
    ("known", "why"),
    [
        (profile("a-c1", losses=20), "failed 20 times in a row"),
        (profile("a-c1", code=[0.2] * 10), "earned 0.20 on average over its last 10 tasks"),
        (profile("a-c1", code=[1.0] * 50, data=[0.0] * 60), "earned 0.00 on average over its last 10 tasks"),
    ],
)
def test_a_failing_child_retires_though_it_works(known: NodeProfile, why: str) -> None:
    [one] = due_retirements([host(child(idle_s=0))], profiles(known), CONFIG)
    assert (one.reason, one.when_idle) == (why, False)


@pytest.mark.parametrize(
    "known",
    [profile("a-c1"), profile("a-c1", code=[0.0] * 9), profile("a-c1", losses=19), profile("a-c1", code=[0.3] * 10)],
)
def test_a_node_without_history_or_at_the_threshold_is_not_retired(known: NodeProfile) -> None:
    assert goes(host(child()), known=(known,)) == []


def test_inherited_losses_retire_no_node() -> None:
    known = NodeProfile(node_id="a-c1")
    for seq in range(1, 12):
        left = Reward(
            reward_id=f"inherit:x-c{seq}",
            kind="inherit",
            task_id=f"x-c{seq}",
            attempt=0,
            node_id="a-c1",
            domain_token="code",
            score=0.0,
            ended_at=float(seq),
        )
        known = apply_reward(known, left, seq)
    assert known.domains["code"].count == 11
    assert goes(host(child()), known=(known,)) == []


def test_a_newcomer_is_not_retired() -> None:
    assert goes(host(child(age_s=59, idle_s=59)), known=(profile("a-c1", losses=99),)) == []


def test_a_manually_added_node_stays() -> None:
    assert goes(host(child(idle_s=99), nodes=("a", "b")), known=(profile("b", losses=99),)) == ["a-c1"]


def test_min_nodes_of_all_hosts_together_stay() -> None:
    config = ClusterConfig(idle_timeout_s=60, min_nodes=3)
    here = host(child("a-c1", idle_s=80), child("a-c2", idle_s=70))
    there = host(child("b-c1", idle_s=90), nodes=("b",), host_id="h2")
    assert goes(here, there, config=config) == ["b-c1", "a-c1"]
    assert goes(here, config=config) == []


states = st.builds(
    ChildState,
    node_id=st.sampled_from([f"a-c{n}" for n in range(9)]),
    parent_id=st.just("a"),
    age_s=st.floats(0, 200),
    idle_s=st.floats(0, 200),
    retiring=st.booleans(),
)
crowds = st.lists(states, max_size=9, unique_by=lambda one: one.node_id).map(lambda every: host(*every))


@given(st.lists(crowds, max_size=3), st.integers(0, 12), st.integers(0, 2))
def test_min_nodes_stay_and_only_children_retire_for_any_records(
    hosts: list[AnnouncedHost], min_nodes: int, losers: int
) -> None:
    hosts = [replace(one, host_id=f"h{n}") for n, one in enumerate(hosts)]
    config = ClusterConfig(idle_timeout_s=60, min_nodes=min_nodes)
    known = profiles(*(profile(f"a-c{n}", losses=20) for n in range(losers)))
    due = due_retirements(hosts, known, config)
    before = sum(len(staying(one)) for one in hosts)
    assert len(due) <= max(0, before - min_nodes)
    assert len({(one.host, one.node_id) for one in due}) == len(due)
    fit = {(one.key, c.node_id) for one in hosts for c in one.spawned if not c.retiring and c.age_s >= 60}
    assert {(one.host, one.node_id) for one in due} <= fit


# -- who inherits


def test_the_most_complementary_idle_node_inherits() -> None:
    known = profiles(profile("a-c1", code=[0.9]), profile("b", code=[0.2]), profile("c", code=[0.8]))
    crowd = host(child(retiring=True), nodes=("b", "c"))
    assert heir(known["local.a-c1"], [crowd], known) == "b"
    assert heir(known["local.a-c1"], [replace(crowd, busy=("b",))], known) == "c"


def test_a_loaded_host_lowers_the_gain_of_its_nodes() -> None:
    known = profiles(profile("a-c1", code=[0.9]), profile("b", code=[0.2]), profile("c", code=[0.3]))
    calm, loaded = host(nodes=("c",)), host(nodes=("b",), host_id="h2", running=8)
    assert heir(known["local.a-c1"], [calm, loaded], known) == "c"


def test_a_node_has_no_heir_without_an_idle_survivor_or_with_a_replica() -> None:
    leaving = host(child(retiring=True), busy=("a",))
    assert heir(profile("a-c1"), [leaving], {}) is None
    twin = host(child("a-c1"), host_id="h2")
    assert heir(profile("a-c1"), [replace(leaving, busy=()), twin], {}) is None


def test_evidence_and_heirs_are_of_one_owner() -> None:
    known = profiles(
        replace(profile("a-c1", losses=20), owner="acme"),
        replace(profile("b", code=[0.2]), owner="acme"),
        profile("c", code=[0.0]),
    )
    mine, theirs = host(child(), nodes=("c",)), host(child(), nodes=("b",), host_id="h2", owner="acme")
    [one] = due_retirements([mine, theirs], known, CONFIG)
    assert (one.host, one.key) == (("acme", "h2"), "acme.a-c1")
    retired = replace(profile("a-c1", code=[0.9]), owner="acme")
    leaving = replace(theirs, spawned=(child(retiring=True),))
    assert heir(retired, [mine, leaving], known) == "b", "a twin of another owner is another node"
    assert heir(retired, [mine], known) is None, "a node of another owner inherits nothing"


def test_equal_gains_fall_to_the_first_by_name_however_the_hosts_are_ordered() -> None:
    hosts = [host(nodes=("c", "b")), host(nodes=("d",), host_id="h2")]
    assert heir(profile("a-c1"), hosts, {}) == heir(profile("a-c1"), hosts[::-1], {}) == "b"


def test_a_bequest_is_one_observation_a_domain_and_no_task_of_the_heir() -> None:
    source = profile("a-c1", code=[1.0, 0.5], data=[0.0] * 30)
    start = profile("b", losses=3, code=[0.0])
    folded = start
    for seq, reward in enumerate(inherited_rewards(source, "local", "b"), start=1):
        folded = apply_reward(folded, reward, seq)
    assert {domain_token: (e.count, e.mean) for domain_token, e in folded.domains.items()} == {
        "code": (2, 0.375),
        "data": (1, 0.0),
    }
    assert (folded.total_tasks, folded.consecutive_losses, folded.tokens) == (0, 3, 0)


def test_a_second_bequest_of_the_same_node_replaces_the_first() -> None:
    folded = NodeProfile(node_id="b")
    for seq, scores in enumerate(([0.0], [1.0]), start=1):
        [reward] = inherited_rewards(profile("a-c1", code=scores), "local", "b")
        folded = apply_reward(folded, reward, seq)
    assert (folded.domains["code"].count, folded.domains["code"].mean) == (1, 1.0)


def test_bequests_of_same_named_nodes_of_two_owners_are_separate() -> None:
    folded = NodeProfile(node_id="b", owner="acme")
    for seq, owner in enumerate(("local", "acme", "x" * 64), start=1):
        [reward] = inherited_rewards(replace(profile("a-c1", code=[1.0]), owner=owner), "acme", "b")
        folded = apply_reward(folded, reward, seq)
    ids = [score.attempt_id for score in folded.domains["code"].scores]
    assert ids[:2] == ["inherit:a-c1", "inherit:acme.a-c1"]
    assert len(ids) == 3
    assert list(inherited_rewards(folded, "acme", "c")) == [], "however long the name, it is known as an inheritance"


def test_inherited_evidence_is_not_bequeathed() -> None:
    [first] = inherited_rewards(profile("a-c1", code=[1.0]), "local", "b")
    between = apply_reward(NodeProfile(node_id="b"), first, 1)
    assert list(inherited_rewards(between, "local", "c")) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=WINDOW))
def test_a_bequest_lies_within_the_earned_evidence(scores: list[float]) -> None:
    [reward] = inherited_rewards(profile("a-c1", code=scores), "local", "b")
    assert min(scores) - 1e-9 <= reward.score <= max(scores) + 1e-9
    assert reward.ended_at == len(scores) - 1


def test_half_the_losses_are_a_warning_and_little_history_is_healthy() -> None:
    config = ClusterConfig(consecutive_loss_limit=20, apoptosis_threshold=0.3)
    assert [health([], losses, config) for losses in (0, 9, 10, 19, 20)] == [
        "healthy", "healthy", "warning", "warning", "dying",
    ]  # fmt: skip
    assert [health([0.0] * count, 0, config) for count in (0, 1, 9, 10)] == ["healthy", "healthy", "healthy", "dying"]
    assert health([0.0] * 20 + [0.5] * 10, 0, config) == "healthy"
    assert health([], 0, ClusterConfig(consecutive_loss_limit=1)) == "healthy"
