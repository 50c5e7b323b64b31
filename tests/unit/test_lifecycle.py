import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.cluster import ApoptosisRejected, ClusterManager, LifecycleManager, MitosisError
from loom.compat.reward_formulas import RewardBus
from loom.types import AgentNode, CapabilityProfile, ClusterConfig, Limits, TaskAd

NOW = 1_000_000.0
LIFE = LifecycleManager()


def node(name: str = "n", *, rewards: tuple[float, ...] = (), idle_s: float = 0, losses: int = 0) -> AgentNode:
    made = AgentNode(id=name, last_active_at=NOW - idle_s, consecutive_losses=losses)
    for i, reward in enumerate(rewards):
        made.remember(task_id=str(i), domain="code", reward=reward, token_cost=0, at=NOW)
    return made


def cluster(*nodes: AgentNode) -> ClusterManager:
    made = ClusterManager()
    for each in nodes:
        made.add_node(each)
    return made


def skilled(name: str, total_tasks: int = 0, /, **scores: float) -> AgentNode:
    return AgentNode(id=name, capabilities=CapabilityProfile(scores=dict(scores), total_tasks=total_tasks))


def health(subject: AgentNode, life: LifecycleManager = LIFE) -> tuple[str, str]:
    report = life.check_health(subject, now=NOW)
    return report.status, report.recommendation


@pytest.mark.parametrize(
    ("complexity", "depth", "splits"),
    [(0.61, 0, True), (0.6, 0, False), (0.9, 1, True), (0.9, 2, False), (None, 0, False)],
)
def test_hard_tasks_split_until_the_depth_is_reached(complexity: float | None, depth: int, *, splits: bool) -> None:
    ad = TaskAd(description="x", estimated_complexity=complexity)

    assert LIFE.should_split(ad, AgentNode(depth=depth)) is splits


def test_a_tasks_own_limits_only_narrow() -> None:
    def splits(**limits: float) -> bool:
        ad = TaskAd(description="x", estimated_complexity=0.7, limits=Limits(**limits))  # type: ignore[arg-type]
        return LIFE.should_split(ad, AgentNode(depth=1))

    assert splits()
    assert not splits(max_depth=1)
    assert not splits(mitosis_threshold=0.8)
    ad = TaskAd(description="x", estimated_complexity=0.5, limits=Limits(mitosis_threshold=0.1, max_depth=16))
    assert not LIFE.should_split(ad, AgentNode())


def test_a_node_without_history_is_healthy_however_long_it_idles() -> None:
    assert health(node(idle_s=10 * 86_400)) == ("healthy", "keep")


@pytest.mark.parametrize("failures", range(1, 10))
def test_a_short_run_of_failures_retires_no_node(failures: int) -> None:
    assert health(node(rewards=(0,) * failures, losses=failures))[0] == "healthy"


def test_a_first_task_leaves_unused_nodes_alone() -> None:
    used, *unused = nodes = [node(str(i)) for i in range(5)]
    RewardBus().evaluate(used, TaskAd(domain="code", description="x"), success=True, now=NOW)

    assert [report.status for report in LIFE.check_all(nodes, now=NOW + 1)] == ["healthy"] * 5
    assert all(each.capabilities.scores == {} for each in unused)


def test_a_node_that_keeps_failing_is_recycled() -> None:
    failing = node()
    for _ in range(10):
        RewardBus().evaluate(failing, TaskAd(domain="code", description="x"), success=False, now=NOW)

    assert failing.consecutive_losses == 10
    assert health(failing) == ("dying", "recycle")


def test_only_the_last_ten_rewards_count() -> None:
    assert health(node(rewards=(0,) * 20 + (1,) * 10))[0] == "healthy"
    assert health(node(rewards=(1,) * 20 + (0,) * 10))[0] == "dying"
    assert LIFE.check_health(node(rewards=(0, 1)), now=NOW).recent_avg_reward == 0.5


def test_losses_warn_at_half_the_limit_and_condemn_at_the_limit() -> None:
    assert health(node(losses=9)) == ("healthy", "keep")
    assert health(node(losses=10)) == ("warning", "merge")
    assert health(node(losses=20)) == ("dying", "recycle")


def test_a_limit_of_one_loss_does_not_warn_a_node_without_losses() -> None:
    assert health(node(), LifecycleManager(ClusterConfig(consecutive_loss_limit=1))) == ("healthy", "keep")


def test_a_node_that_worked_and_then_idled_too_long_passes_its_knowledge_on() -> None:
    idle = node(rewards=(1,), idle_s=301)

    assert health(idle) == ("dying", "merge")
    assert LIFE.check_health(idle, now=NOW).idle_ms == 301_000


def test_a_node_at_work_is_not_idle() -> None:
    long_run = node(rewards=(1,), idle_s=301)
    long_run.status = "busy"

    assert health(long_run) == ("healthy", "keep")


def test_a_child_is_deeper_modest_and_shares_no_state_with_its_parent() -> None:
    parent = skilled("p", 7, code=0.9, data=0.8)
    parent.capabilities.tools, parent.agent = ["sql"], object()

    child = LIFE.mitosis(parent)

    assert (child.parent_id, child.depth, child.agent) == ("p", 1, parent.agent)
    assert child.capabilities == CapabilityProfile(scores={"code": 0.5, "data": 0.5}, tools=["sql"])
    assert child.reward_history == []
    child.capabilities.tools.append("web")
    child.capabilities.scores["code"] = 0.1
    assert parent.capabilities.tools == ["sql"]
    assert parent.capabilities.scores["code"] == 0.9
    assert parent.status == "idle"


def test_a_child_node_may_be_created_for_one_domain() -> None:
    assert LIFE.mitosis(skilled("p", code=0.9), domain="data").capabilities.scores == {"data": 0.5}


def test_division_stops_at_the_depth() -> None:
    life = LifecycleManager(ClusterConfig(max_depth=1))
    child = life.mitosis(AgentNode(id="p"))

    with pytest.raises(MitosisError, match="1 divisions deep") as caught:
        life.mitosis(child)
    assert caught.value.node_id == child.id


def test_division_stops_when_the_cluster_is_full() -> None:
    parent = node("p")
    made, life = cluster(parent), LifecycleManager(ClusterConfig(max_nodes=2))
    child = life.mitosis(parent, made)

    assert made.nodes == [parent, child]
    with pytest.raises(MitosisError, match="2 nodes"):
        life.mitosis(parent, made)
    assert made.nodes == [parent, child]


def test_a_retiring_node_passes_capabilities_to_the_best_complement() -> None:
    old, alike, other = skilled("old", 3, code=0.9), skilled("alike", 1, code=0.8), skilled("other", 1, code=0.1)
    made = cluster(old, alike, other)

    assert LIFE.apoptosis(old, made) is other
    assert made.nodes == [alike, other]
    assert old.status == "dying"
    assert other.capabilities.scores["code"] == pytest.approx(0.1 * 0.25 + 0.9 * 0.75)
    assert alike.capabilities.scores == {"code": 0.8}


def test_load_makes_an_heir_less_likely_and_a_busy_node_is_excluded() -> None:
    old, loaded, free = skilled("old", code=0.9), skilled("loaded", code=0.2), skilled("free", code=0.4)
    loaded.load = 1.0
    assert LIFE.apoptosis(old, cluster(old, loaded, free)) is free

    old, busy = skilled("old", code=0.9), skilled("busy", code=0.2)
    busy.status = "busy"
    assert LIFE.apoptosis(old, cluster(old, busy)) is None
    assert busy.capabilities.scores == {"code": 0.2}


def test_the_last_nodes_the_busy_and_strangers_may_not_retire() -> None:
    only = node("only")
    with pytest.raises(ApoptosisRejected, match="at least 1"):
        LIFE.apoptosis(only, cluster(only))

    working, splitting = node("w"), node("s")
    working.status, splitting.status = "busy", "splitting"
    made = cluster(working, splitting, node("x"))
    for each in (working, splitting):
        with pytest.raises(ApoptosisRejected, match="is working"):
            LIFE.apoptosis(each, made)
    with pytest.raises(ApoptosisRejected, match="not in the cluster") as caught:
        LIFE.apoptosis(node("w"), made)
    assert caught.value.node_id == "w"
    assert len(made.nodes) == 3


def test_merging_weighs_by_experience() -> None:
    source, target = skilled("s", 1, code=1.0), skilled("t", 3, Code=0.6)
    source.capabilities.tools, target.capabilities.tools = ["sql", "git"], ["git"]

    LIFE.merge_capabilities(source, target)

    assert target.capabilities.scores == {"Code": pytest.approx(0.7)}
    assert target.capabilities.tools == ["git", "sql"]
    assert target.capabilities.total_tasks == 3
    assert source.capabilities == CapabilityProfile(scores={"code": 1.0}, tools=["sql", "git"], total_tasks=1)


def test_two_nodes_without_any_task_merge_half_and_half() -> None:
    source, target = skilled("s", code=1.0), skilled("t", code=0.6)
    LIFE.merge_capabilities(source, target)

    assert target.capabilities.scores["code"] == pytest.approx(0.8)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 50), st.integers(0, 50))
def test_a_merged_score_lies_between_the_two(given_: float, own: float, source_tasks: int, target_tasks: int) -> None:
    source, target = skilled("s", source_tasks, code=given_), skilled("t", target_tasks, code=own)
    LIFE.merge_capabilities(source, target)

    low, high = sorted((given_, own))
    assert low - 1e-9 <= target.capabilities.scores["code"] <= high + 1e-9
