from hypothesis import given
from hypothesis import strategies as st

from loom.phases.adapt.fold import fold, kept_id
from loom.phases.adapt.rebuild import start_of
from loom.phases.adapt.snapshots import snapshot_of
from loom.schemas.learning import MAX_DOMAINS, WINDOW, NodeProfile, Reward, Snapshot
from loom.schemas.wire import MAX_MESSAGE_BYTES, decode, encode


def part(node: str, through: int, nodes: int = 2) -> Snapshot:
    return Snapshot(
        through=through, nodes=nodes, profile=NodeProfile(node_id=node, last_seq=through, total_tasks=through)
    )


def test_a_rebuild_begins_at_the_oldest_finished_round_that_is_still_followed_by_everything() -> None:
    rounds = [part("a", 10), part("b", 10), part("a", 20), part("b", 20), part("a", 30), part("b", 30)]
    assert start_of(rounds, 11).seq == 10
    assert start_of(rounds, 12).seq == 20
    assert {node: one.last_seq for node, one in start_of(rounds, 12).profiles.items()} == {"a": 20, "b": 20}


def test_a_round_somebody_died_in_is_no_beginning() -> None:
    assert start_of([part("a", 20), part("a", 30), part("b", 30)], 12).seq == 30
    assert start_of([part("a", 20), part("a", 20)], 12) == (11, {}, False)
    assert start_of([], 12) == (11, {}, False)


def test_a_snapshot_teaches_nobody_who_knows_the_node() -> None:
    known = NodeProfile(node_id="a", last_seq=3, total_tasks=3)
    told = snapshot_of(NodeProfile(node_id="a", last_seq=9, total_tasks=99), 9, 1)
    assert fold(known, told, 10) is known


@given(
    st.text(alphabet=st.sampled_from('a\x01😀"\\é'), min_size=200, max_size=200), st.floats(0, 1), st.floats(1e8, 1e10)
)
def test_the_snapshot_of_a_node_that_knows_all_it_may_is_a_message(text: str, score: float, ended_at: float) -> None:
    profile, seq = NodeProfile(node_id="n" * 64), 0
    for domain in range(MAX_DOMAINS):
        slug, seq = f"{domain:064}", seq + 1
        one = Reward(
            reward_id=text, task_id="t", attempt=1, node_id=profile.node_id, slug=slug, score=score, ended_at=ended_at
        )
        profile = fold(profile, one, seq)
    one_each = len(encode(profile))
    [entry] = profile.domains[slug].scores
    most = one_each + MAX_DOMAINS * (WINDOW - 1) * (max(len(encode(entry)), 145) + 1)
    assert most < MAX_MESSAGE_BYTES - 1000
    assert decode(encode(snapshot_of(profile, seq, 1)), Reward).snapshot == Snapshot(
        through=seq, nodes=1, profile=profile
    )


def test_ids_that_differ_are_kept_apart_and_twins_of_long_ones_found() -> None:
    long, other = "x" * 200, "x" * 199 + "y"
    assert kept_id(long) != kept_id(other)
    assert kept_id("t:1:rules") == "t:1:rules"
    profile = NodeProfile(node_id="a")
    for seq, (reward_id, score) in enumerate([(long, 1.0), (other, 1.0), (long, 0.0)], start=1):
        one = Reward(
            reward_id=reward_id, task_id="t", attempt=1, node_id="a", slug="code", score=score, ended_at=float(seq)
        )
        profile = fold(profile, one, seq)
    assert (profile.total_tasks, profile.domains["code"].count, profile.domains["code"].mean) == (2, 2, 0.5)
