from hypothesis import given
from hypothesis import strategies as st

from loom.phases.match.ranking import Ranking

means = st.dictionaries(st.sampled_from(["code", "data", "math"]), st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@given(st.lists(st.tuples(st.sampled_from("abcdef"), means)), st.integers(0, 8))
def test_after_any_changes_the_best_of_each_domain_come_best_first(
    changes: list[tuple[str, dict[str, float]]], limit: int
) -> None:
    ranking = Ranking()
    for node, scores in changes:
        ranking.update(node, scores)
    known = dict(changes)
    for domain_token in ("code", "data", "math"):
        there = {node: scores[domain_token] for node, scores in known.items() if domain_token in scores}
        assert ranking.best(domain_token, limit) == tuple(sorted(there, key=lambda node: (-there[node], node))[:limit])
        assert (domain_token in ranking._order) == bool(there)


def test_given_scores_are_copied() -> None:
    ranking, scores = Ranking(), {"code": 0.5}
    ranking.update("n1", scores)
    scores["code"] = 0.9
    ranking.update("n1", scores)
    assert ranking.best("code", 9) == ("n1",)
