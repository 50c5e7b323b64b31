import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.bus.bus import Bus
from loom.bus.natsio.stored_message import StoredMessage
from loom.phases.adapt.evidence import apply_reward
from loom.phases.adapt.profile_store import ProfileStore
from loom.phases.adapt.rebuild import start_of
from loom.phases.adapt.reward_weights import ID_LENGTH
from loom.phases.adapt.snapshots import Snapshots, snapshot_of
from loom.phases.adapt.timings import AdaptTimings
from loom.schemas.base import MAX_MESSAGE_BYTES, decode, encode
from loom.schemas.learning.profile import MAX_DOMAINS, WINDOW, NodeProfile, Score
from loom.schemas.learning.reward import Reward, Snapshot

LONGEST = 178
"""Bytes an entry takes at most."""


def reward(source: str, score: float, *, domain_token: str, ended_at: float, attempt: int) -> Reward:
    return Reward(
        reward_id="r",
        task_id="t" * 64,
        attempt=attempt,
        source=source,
        node_id="n" * 64,
        domain_token=domain_token,
        score=score,
        ended_at=ended_at,
    )


def part(node: str, through: int, nodes: int = 2) -> Snapshot:
    return Snapshot(
        through=through, nodes=nodes, profile=NodeProfile(node_id=node, last_seq=through, total_tasks=through)
    )


def test_a_rebuild_starts_at_the_oldest_finished_round_with_all_later_rewards() -> None:
    rounds = [part("a", 10), part("b", 10), part("a", 20), part("b", 20), part("a", 30), part("b", 30)]
    assert start_of(rounds, 11).seq == 10
    assert start_of(rounds, 12).seq == 20
    assert {node: one.last_seq for node, one in start_of(rounds, 12).profiles.items()} == {"local.a": 20, "local.b": 20}


def test_an_unfinished_round_is_not_a_starting_point() -> None:
    assert start_of([part("a", 20), part("a", 30), part("b", 30)], 12).seq == 30
    assert start_of([part("a", 20), part("a", 20)], 12) == (11, {}, False)
    assert start_of([], 12) == (11, {}, False)


def test_a_snapshot_does_not_change_a_known_profile() -> None:
    known = NodeProfile(node_id="a", last_seq=3, total_tasks=3)
    snapshot = snapshot_of(NodeProfile(node_id="a", last_seq=9, total_tasks=99), 9, 1)
    assert apply_reward(known, snapshot, 10) is known


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(1e8, 1e10), st.integers(0, 9_999_999))
def test_the_snapshot_of_a_full_profile_fits_a_message(scores: list[float], ended_at: float, attempt: int) -> None:
    """Any number of sources fits, with the longest names."""
    profile, seq = NodeProfile(node_id="n" * 64), 0
    for domain in range(MAX_DOMAINS):
        domain_token = f"{domain:064}"
        for judge, score in enumerate(scores):
            seq += 1
            profile = apply_reward(
                profile,
                reward(f"{judge:064}", score, domain_token=domain_token, ended_at=ended_at, attempt=attempt),
                seq,
            )
    one_each = len(encode(profile))
    [entry] = profile.domains[domain_token].scores
    assert len(encode(entry)) <= LONGEST
    most = one_each + MAX_DOMAINS * (WINDOW - 1) * (LONGEST + 1)
    assert most < MAX_MESSAGE_BYTES - 1000
    assert decode(encode(snapshot_of(profile, seq, 1)), Reward).snapshot == Snapshot(
        through=seq, nodes=1, profile=profile
    )


def test_a_profile_without_scores_by_source_is_read() -> None:
    old = b'{"node_id":"a","last_seq":3,"domains":{"code":{"scores":[["t:1:rules",1.0,2.5]],"count":1,"mean":1.0}}}'
    profile = decode(old, NodeProfile)
    assert profile.domains["code"].scores == (Score(attempt_id="t:1:rules", score=1.0, ended_at=2.5),)
    after = apply_reward(profile, reward("rules", 0.0, domain_token="code", ended_at=3.0, attempt=2), 4)
    assert (after.domains["code"].count, after.domains["code"].mean) == (2, 0.5)


def test_attempts_of_endless_numbers_are_kept_apart() -> None:
    profile = NodeProfile(node_id="a")
    for seq, attempt in enumerate((10**100, 10**100 + 1, 10**100), start=1):
        profile = apply_reward(
            profile, reward("rules", seq / 3, domain_token="code", ended_at=1.0, attempt=attempt), seq
        )
    assert [round(entry.score, 2) for entry in profile.domains["code"].scores] == [1.0, 0.67]
    assert all(len(entry.attempt_id) <= ID_LENGTH for entry in profile.domains["code"].scores)


# -- when a round is due


def counted(snapshots: Snapshots, seq: int, part: Reward | None = None, pending: int = 0) -> bool:
    """Count a message of about 1 kB, and return whether a round is due after it."""
    message = StoredMessage("loom.reward.rules.local.a.code", b"x" * 700, {}, seq, 1.0, pending)
    snapshots.count(message, part)
    return snapshots._due.is_set()


@pytest.fixture
def counter() -> Snapshots:
    """Follows a stream of at most 40 messages: a round is due after more than ten."""
    snapshots = Snapshots(Bus("nats://127.0.0.1:1"), ProfileStore(), AdaptTimings())
    snapshots._limit = 40 * 1000
    return snapshots


def in_a_round(node: int, through: int, nodes: int) -> Reward:
    return snapshot_of(NodeProfile(node_id=f"n{node}", last_seq=1), through, nodes)


async def test_a_round_is_due_after_a_quarter_of_the_stream(counter: Snapshots) -> None:
    assert [counted(counter, seq) for seq in range(1, 13)].index(True) == 10


async def test_a_round_larger_than_a_quarter_does_not_cause_another_one(counter: Snapshots) -> None:
    assert not any(counted(counter, seq, in_a_round(seq, 1, 13)) for seq in range(1, 14))
    assert [counted(counter, seq) for seq in range(14, 26)].index(True) == 10


async def test_rounds_of_two_replicas_may_interleave(counter: Snapshots) -> None:
    seqs = range(1, 17)
    assert not any(counted(counter, seq, in_a_round(seq // 2, 1 + seq % 2, 8)) for seq in seqs)
    assert not counter._since


async def test_an_abandoned_round_counts_like_other_messages(counter: Snapshots) -> None:
    assert not any(counted(counter, seq, in_a_round(seq, 1, 99)) for seq in range(1, 13))
    assert not counted(counter, 13, in_a_round(1, 2, 99))
    assert counted(counter, 14, in_a_round(1, 3, 99))
