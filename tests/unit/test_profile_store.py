"""Profiles in memory, decoded or encoded."""

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from loom.phases.adapt.profile_store import ProfileStore
from loom.schemas.learning.profile import DomainEvidence, NodeProfile, Score


def profile(node: str, scores: int, last_seq: int = 1) -> NodeProfile:
    window = tuple(Score(attempt_id=f"{node}{n}:1", score=n / 10, ended_at=n) for n in range(scores))
    return NodeProfile(node_id=node, last_seq=last_seq, domains={"code": DomainEvidence(scores=window)})


changes = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 5), st.integers(1, 9)), max_size=30)


@given(changes, st.integers(0, 12))
def test_a_store_is_a_dictionary_however_little_of_it_is_decoded(
    history: list[tuple[str, int, int]], limit: int
) -> None:
    store, plain = ProfileStore(decoded_scores=limit), dict[str, NodeProfile]()
    for node, scores, seq in history:
        store[node] = plain[node] = profile(node, scores, seq)
        if scores == 0:
            assert store.pop(node) == plain.pop(node)
        assert (store == plain, store.pop("unknown")) == (True, None)
        assert {key: store.last_seq(key) for key in store} == {key: kept.last_seq for key, kept in plain.items()}
    assert ("g" in store, store.get("g"), store.last_seq("g")) == (False, None, None)
    assert len(store) == len(plain)


def test_only_the_profiles_changed_last_stay_decoded() -> None:
    store = ProfileStore(decoded_scores=10)
    for node in "abcd":
        store[node] = profile(node, 4)
    assert list(store._decoded) == ["c", "d"]
    store["a"] = replace(store["a"], last_seq=2)
    assert (list(store._decoded), sorted(store._encoded)) == (["d", "a"], ["b", "c"])


def test_a_copy_does_not_change_with_the_store() -> None:
    store = ProfileStore(decoded_scores=4)
    store["a"], store["b"] = profile("a", 4), profile("b", 4)
    copy = store.copy()
    store["a"], store["c"] = profile("a", 1, 7), profile("c", 1)
    assert copy == {"a": profile("a", 4), "b": profile("b", 4)}
