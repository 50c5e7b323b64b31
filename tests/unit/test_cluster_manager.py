import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.cluster import ClusterManager, InvalidNode
from loom.types import AgentNode, CapabilityProfile, ClusterConfig, TaskAd

CODE = TaskAd(task_id="t", domain="code", description="sort")


def node(
    name: str,
    score: float | None = None,
    *,
    load: float = 0.0,
    success_rate: float = 0.5,
    tools: tuple[str, ...] = (),
    status: str = "idle",
) -> AgentNode:
    facts = CapabilityProfile({} if score is None else {"code": score}, list(tools), success_rate=success_rate)
    return AgentNode(id=name, capabilities=facts, load=load, status=status)  # type: ignore[arg-type]  # a status


def cluster(*nodes: AgentNode) -> ClusterManager:
    made = ClusterManager()
    for each in nodes:
        made.add_node(each)
    return made


def winner(*nodes: AgentNode, ad: TaskAd = CODE) -> str | None:
    best = cluster(*nodes).select_winner(ad)
    return best.id if best else None


def test_nodes_are_kept_in_the_order_they_came_and_can_leave() -> None:
    a, b = node("a"), node("b")
    made = cluster(a, b)

    assert made.nodes == [a, b]
    assert made.get_node("b") is b
    assert made.remove_node("a") is a
    assert made.nodes == [b]
    assert made.remove_node("a") is None
    assert made.get_node("a") is None


def test_the_list_of_nodes_is_a_copy() -> None:
    made = cluster(node("a"))
    made.nodes.clear()

    assert len(made.nodes) == 1


def test_a_second_node_of_the_same_id_replaces_the_first() -> None:
    first, other, second = node("a"), node("b"), node("a")
    made = cluster(first, other, second)

    assert made.nodes == [second, other]
    assert made.get_node("a") is second


def test_a_cluster_keeps_its_config() -> None:
    config = ClusterConfig(max_nodes=3)

    assert ClusterManager(config).config is config
    assert ClusterManager().config == ClusterConfig()


@pytest.mark.parametrize("name", ["", "a b", "a.b", "skill:x", "n" * 65, "节点"])
def test_an_id_that_cannot_be_part_of_a_subject_is_refused(name: str) -> None:
    with pytest.raises(InvalidNode, match="1 to 64"):
        cluster(node(name))


def test_load_is_clamped_and_that_of_an_unknown_node_has_no_effect() -> None:
    made = cluster(node("a"))
    made.update_load("a", 7)
    assert made.nodes[0].load == 1
    made.update_load("a", -1)
    assert made.nodes[0].load == 0
    made.update_load("x", 0.5)
    assert made.get_node("x") is None


def test_find_idle_passes_over_the_busy() -> None:
    assert cluster(node("a", status="busy"), node("b")).find_idle() is not None
    assert cluster(node("a", status="busy")).find_idle() is None


def test_a_bid_is_the_weighed_sum_of_its_parts() -> None:
    bidder = node("a", 0.9, load=0.4, success_rate=0.8, tools=("sql", "git"))
    ad = TaskAd(task_id="t", domain="code", description="x", required_tools=("sql", "web"))

    bid = ClusterManager().compute_bid(bidder, ad)

    assert bid.breakdown == {"capability": 0.9, "availability": 0.6, "history": 0.8, "tools": 0.5}
    assert bid.score == pytest.approx(0.4 * 0.9 + 0.25 * 0.6 + 0.2 * 0.8 + 0.15 * 0.5)
    assert (bid.agent_id, bid.task_id) == ("a", "t")


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_bid_stays_between_0_and_1_and_rises_with_skill(score: float, load: float, rate: float) -> None:
    bid = ClusterManager().compute_bid(node("a", score, load=load, success_rate=rate), CODE)
    better = ClusterManager().compute_bid(node("a", min(1, score + 0.1), load=load, success_rate=rate), CODE)

    assert 0 <= bid.score <= 1 + 1e-9
    assert better.score >= bid.score


def test_a_new_node_bids_like_an_average_node_and_not_like_a_failing_one() -> None:
    fresh = ClusterManager().compute_bid(AgentNode(), CODE).score

    assert fresh == ClusterManager().compute_bid(node("b", 0.5, success_rate=0.5), CODE).score
    assert fresh > ClusterManager().compute_bid(node("c", 0.5, success_rate=0.0), CODE).score
    assert fresh == pytest.approx(0.7)


def test_a_tool_required_twice_counts_once() -> None:
    ad = TaskAd(domain="code", description="x", required_tools=("sql", "sql"))

    assert ClusterManager().compute_bid(node("a", tools=("sql",)), ad).breakdown["tools"] == 1


def test_the_better_node_wins() -> None:
    assert winner(node("novice", 0.2), node("expert", 0.9)) == "expert"


def test_a_busy_expert_beats_an_idle_novice() -> None:
    assert winner(node("novice", 0.1), node("expert", 1.0, load=0.8, success_rate=1.0, status="busy")) == "expert"


def test_of_equal_nodes_the_freer_wins() -> None:
    assert winner(node("full", 0.5, load=0.8), node("free", 0.5, load=0.2)) == "free"


def test_nodes_that_split_or_die_do_not_bid() -> None:
    assert winner(node("s", 1, status="splitting"), node("d", 1, status="dying"), node("a", 0)) == "a"


def test_ties_go_to_the_node_added_first() -> None:
    assert winner(node("b", 0.5), node("a", 0.5)) == "b"


def test_an_empty_cluster_has_no_winner() -> None:
    assert winner() is None


def test_a_pinned_ad_gets_a_bid_of_one_node_only() -> None:
    ad = TaskAd(domain="code", description="x", node_id="weak")

    assert winner(node("strong", 1), node("weak", 0), ad=ad) == "weak"
    assert winner(node("strong", 1), ad=ad) is None


def test_bids_come_best_first_and_may_be_given_back_for_a_decision() -> None:
    made = cluster(node("a", 0.2), node("b", 0.9), node("c", 0.5))
    bids = made.collect_bids(CODE)

    assert [bid.agent_id for bid in bids] == ["b", "c", "a"]
    made.remove_node("b")
    best = made.select_winner(bids)
    assert best is not None
    assert best.id == "c"
