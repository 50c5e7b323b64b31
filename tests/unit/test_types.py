import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.nodes import unit
from loom.schemas.base import decode, encode
from loom.schemas.learning.profile import WINDOW, DomainEvidence, NodeProfile, Score
from loom.schemas.tokens import domain_token
from loom.types import AgentNode, CapabilityProfile, SkillTrigger, TaskAd


def node(**scores: float) -> AgentNode:
    return AgentNode(id="n", capabilities=CapabilityProfile(scores=dict(scores)))


def profile(**domains: list[tuple[str, float, float]]) -> NodeProfile:
    evidence = {
        name: DomainEvidence(
            scores=tuple(Score(attempt_id=i, score=s, ended_at=t) for i, s, t in entries),
            count=len(entries),
            mean=sum(score for _, score, _ in entries) / len(entries),
        )
        for name, entries in domains.items()
    }
    total = sum(map(len, domains.values()))
    return NodeProfile(node_id="n", domains=evidence, total_tasks=total, success_rate=0.75, consecutive_losses=2)


def test_a_new_node_is_idle_free_unproven_and_neutral() -> None:
    fresh, other = AgentNode(), AgentNode()

    assert (fresh.status, fresh.load, fresh.depth, fresh.agent, fresh.parent_id) == ("idle", 0, 0, None, None)
    assert fresh.capabilities.success_rate == 0.5
    assert len(fresh.id) == 8
    assert fresh.id != other.id
    assert fresh.capabilities.scores is not other.capabilities.scores


def test_a_dict_of_ratings_is_a_profile() -> None:
    node = AgentNode(id="a", capabilities={"code": 0.9})  # type: ignore[arg-type]  # as users without types write

    assert node.capabilities == CapabilityProfile(scores={"code": 0.9})
    assert node.to_bid(domain="code").self_rating == 0.9


def test_the_agent_may_be_set_later() -> None:
    late = AgentNode(id="late")
    late.agent = object()

    assert late.agent is not None


def test_the_task_ad_of_the_old_library_needs_only_domain_and_description() -> None:
    ad = TaskAd(domain="code", description="sort")

    assert len(ad.task_id) == 32
    assert ad.priority == "normal"


@pytest.mark.parametrize(
    ("known", "asked", "score"),
    [
        ({"code": 0.9}, "code", 0.9),
        ({"Code": 0.9}, "code", 0.9),
        ({"code": 0.9}, " CODE ", 0.9),
        ({"代码": 0.9}, domain_token("代码"), 0.9),
        ({"代码": 0.9}, "数据", 0.5),
        ({}, "code", 0.5),
        ({"code": 7.0}, "code", 1.0),
        ({"code": float("nan")}, "code", 0.0),
    ],
)
def test_scores_are_found_by_domain_in_any_wording(known: dict[str, float], asked: str, score: float) -> None:
    assert CapabilityProfile(scores=known).score(asked) == score


@given(st.floats())
def test_unit_always_lands_between_0_and_1(value: float) -> None:
    assert 0 <= unit(value) <= 1


def test_history_keeps_the_newest_of_each_domain() -> None:
    busy = node()
    busy.remember(task_id="rare", domain="data", reward=1, token_cost=0, at=0)
    for i in range(WINDOW + 5):
        busy.remember(task_id=str(i), domain="code" if i % 2 else "Code", reward=1, token_cost=0, at=i)

    code = [record.task_id for record in busy.reward_history if record.domain != "data"]
    assert code == [str(i) for i in range(5, WINDOW + 5)]
    assert busy.reward_history[0].task_id == "rare"


def test_a_bid_carries_claim_load_and_the_required_tools_the_node_has() -> None:
    coder = node(代码=0.9)
    coder.capabilities.tools = ["sql", "shell"]
    coder.load = 0.25

    bid = coder.to_bid(domain=domain_token("代码"), required_tools=("shell", "shell", "browser"))

    assert (bid.node_id, bid.self_rating, bid.load, bid.tools) == ("n", 0.9, 0.25, ("shell",))


@given(st.dictionaries(st.text(max_size=8), st.floats()), st.text(max_size=8), st.floats())
def test_the_bid_of_any_node_crosses_the_wire(scores: dict[str, float], domain: str, load: float) -> None:
    odd = AgentNode(id="n", capabilities=CapabilityProfile(scores=scores), load=load)
    bid = odd.to_bid(domain=domain)

    assert decode(encode(bid), type(bid)) == bid
    assert bid == odd.to_bid(domain=domain)


@given(st.sampled_from(["code", "Code", "数据", "two words", ""]))
def test_a_domain_and_its_slug_bid_alike(domain: str) -> None:
    skilled = AgentNode(id="n", capabilities=CapabilityProfile(scores={domain: 0.8}))

    assert skilled.to_bid(domain=domain) == skilled.to_bid(domain=domain_token(domain))
    assert skilled.to_bid(domain=domain).self_rating == 0.8


def test_mirroring_shows_learned_scores_and_keeps_the_makers_ratings_for_bids() -> None:
    learner = node(Code=0.9)
    learner.last_active_at = 5.0

    learner.mirror(
        profile(code=[("t1:1:rules", 1.0, 10.0), ("t3:1:rules", 0.0, 30.0)], data=[("t2:1:rules", 0.5, 20.0)])
    )

    facts = learner.capabilities
    assert (facts.total_tasks, facts.success_rate, learner.consecutive_losses) == (3, 0.75, 2)
    assert facts.scores == pytest.approx({"Code": (1.0 + 0.0 + 2 * 0.9) / 4, "data": 0.5})
    assert learner.self_ratings == {"Code": 0.9}
    assert (learner.claim("code"), learner.claim("data"), learner.to_bid(domain="Code").self_rating) == (0.9, 0.5, 0.9)
    assert [(r.task_id, r.reward, r.domain, r.timestamp) for r in learner.reward_history] == [
        ("t1", 1.0, "Code", 10.0),
        ("t2", 0.5, "data", 20.0),
        ("t3", 0.0, "Code", 30.0),
    ]
    assert learner.last_active_at == 30.0


def test_a_rating_that_is_set_after_something_was_learned_is_the_makers_own() -> None:
    learner = node(code=0.9)
    learner.mirror(profile(code=[("t1:1:rules", 0.0, 10.0)]))
    learner.capabilities.scores["code"] = 0.3
    assert learner.claim("code") == 0.3

    learner.mirror(profile(code=[("t1:1:rules", 0.0, 10.0)]))
    assert (learner.self_ratings, learner.claim("code")) == ({"code": 0.3}, 0.3)
    assert learner.capabilities.scores["code"] == pytest.approx(0.2)


def test_mirroring_twice_changes_nothing_more() -> None:
    learner, facts = node(), profile(code=[("t1:1:rules", 1.0, 10.0)])
    learner.mirror(facts)
    once = list(learner.reward_history), dict(learner.capabilities.scores)
    learner.mirror(facts)

    assert (learner.reward_history, learner.capabilities.scores) == once


def test_a_profile_without_tasks_leaves_the_success_rate_neutral() -> None:
    learner = node()
    learner.mirror(NodeProfile(node_id="n"))

    assert learner.capabilities.success_rate == 0.5


@pytest.mark.parametrize("kind", ["keyword", "pattern", "semantic", "custom"])
def test_a_trigger_that_could_never_match_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind} trigger needs"):
        SkillTrigger(type=kind)  # type: ignore[arg-type]  # the four kinds


def test_a_pattern_that_does_not_compile_is_refused() -> None:
    with pytest.raises(ValueError, match="does not compile"):
        SkillTrigger(type="pattern", pattern="(")


def test_importing_the_shapes_loads_neither_openai_nor_nats_nor_asyncio() -> None:
    code = "import sys, loom.types, loom.cluster; print({'openai', 'nats', 'asyncio'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert run.stdout.strip() == "set()"
