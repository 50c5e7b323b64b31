"""Newcomers of one owner share one newcomer's chance: many names give no advantage."""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.auctions import key
from support.builders import ad, envelope

from loom.bus.host_directory import HostKey
from loom.phases.adapt.evidence import apply_reward
from loom.phases.match.award_policies import POLICIES
from loom.phases.match.newcomers import WEIGHED_FOR_S, Newcomers
from loom.phases.match.ranked_bids import award
from loom.phases.match.scoring import AuctionContext, score
from loom.schemas.auction import Award, Bid
from loom.schemas.envelope import Envelope, FailedAttempt
from loom.schemas.learning.profile import DomainEvidence, NodeProfile, Score
from loom.schemas.learning.reward import Reward

Named = tuple[HostKey, Bid]
TASKS = 50


class Cluster:
    """A domain whose tasks are awarded one after the other; each is judged after the next `late` ones."""

    def __init__(self, bids: Sequence[Named], works: Callable[[int, Award], float], *, policy: str = "glr_ucb") -> None:
        self.bids, self.works, self.policy = bids, works, policy
        self.profiles: dict[str, NodeProfile] = {}
        self.newcomers = Newcomers()
        self.pending: Counter[tuple[str, str]] = Counter()
        self.awards: list[Award] = []

    def play(self, tasks: int = TASKS, late: int = 0) -> "Cluster":
        for number in range(tasks):
            book = AuctionContext(
                self.profiles, POLICIES[self.policy], pending_awards=self.pending, newcomers=self.newcomers
            )
            won = award(envelope(ad(task_id=f"t{number}"), now=0), self.bids, book)
            self.awards.append(won)
            self.pending[won.node, "code"] += 1
            if number >= late:
                self.judge(number - late)
        return self

    def judge(self, number: int) -> None:
        won = self.awards[number]
        reward = Reward(
            reward_id=f"t{number}:1:rules",
            task_id=f"t{number}",
            attempt=1,
            node_id=won.node_id,
            owner=won.owner,
            domain_token="code",
            score=self.works(number, won),
            ended_at=number,
        )
        known = self.profiles.get(won.node, NodeProfile(node_id=won.node_id, owner=won.owner))
        self.profiles[won.node] = apply_reward(known, reward, number + 1, forget=self.policy == "glr_ucb")
        self.newcomers.update(won.node, self.profiles[won.node].domains)
        self.pending[won.node, "code"] -= 1

    def won_by(self, owner: str) -> list[int]:
        return [number for number, won in enumerate(self.awards) if won.owner == owner]


def bids(owner: str, *names: str, rating: float = 0.5) -> list[Named]:
    return [(key(f"h-{owner}", owner), Bid(node_id=name, self_rating=rating)) for name in names]


NAMES = [f"n{number}" for number in range(500)]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["glr_ucb", "ucb", "greedy", "thompson", "round_robin", "random"])
@pytest.mark.parametrize("rating", [0.5, 1.0])
def test_five_hundred_names_win_no_larger_share_than_one_newcomer(policy: str, rating: float) -> None:
    others = [*bids("local", "a", "b"), *bids("beta", "c")]

    def works(_: int, won: Award) -> float:
        return float(won.owner != "acme")

    def share(*names: str) -> list[int]:
        return Cluster([*others, *bids("acme", *names, rating=rating)], works, policy=policy).play().won_by("acme")

    assert share(*NAMES) == share("n0")
    assert len(share("n0")) < TASKS / 2


@settings(deadline=None, max_examples=25)
@given(
    names=st.integers(2, 40),
    late=st.integers(0, 20),
    ratings=st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)),
    luck=st.lists(st.booleans(), min_size=TASKS, max_size=TASKS),
)
def test_failing_names_with_late_judgements_win_the_share_of_one(
    names: int, late: int, ratings: tuple[float, float], luck: list[bool]
) -> None:
    def works(number: int, won: Award) -> float:
        return float(won.owner != "acme" and luck[number])

    def share(*names: str) -> list[int]:
        named = [*bids("local", "a", "b", rating=ratings[0]), *bids("acme", *names, rating=ratings[1])]
        return Cluster(named, works).play(late=late).won_by("acme")

    assert share(*NAMES[:names]) == share("n0")


def test_among_the_nodes_of_one_owner_each_has_its_own_chance() -> None:
    """Names are an advantage over other owners only: a cluster of one named owner learns like one of `local`."""

    def picks(owner: str) -> float:
        luck = {"a": 0.9, "b": 0.4, "c": 0.2}
        cluster = Cluster(bids(owner, *luck), lambda number, won: float((number * 7 % 10) / 10 < luck[won.node_id]))
        return sum(won.node_id == "a" for won in cluster.play(300).awards) / 300

    assert picks("acme") > 0.6
    assert picks("acme") == pytest.approx(picks("local"), abs=0.15)


# -- a task that a newcomer has failed


def failed(node_id: str, owner: str, *, excluded: bool = True) -> Envelope:
    tried = FailedAttempt(attempt=1, node_id=node_id, owner=owner, host_id="h1", code="agent_failed")
    name = node_id if owner == "local" else f"{owner}.{node_id}"
    return replace(
        envelope(ad(), now=0), attempt=2, failures=1, failed_attempts=(tried,), excluded=(name,) if excluded else ()
    )


def known(node_id: str, owner: str, mean: float, count: int = 9) -> NodeProfile:
    scores = (Score(attempt_id="r:1", score=mean, ended_at=0),)
    evidence = DomainEvidence(scores=scores, count=count, mean=mean)
    return NodeProfile(node_id=node_id, owner=owner, domains={"code": evidence})


def book_of(*profiles: NodeProfile) -> AuctionContext:
    newcomers = Newcomers()
    for one in profiles:
        newcomers.update(one.name, one.domains)
    return AuctionContext({one.name: one for one in profiles}, newcomers=newcomers)


def ranked(task: Envelope, named: Sequence[Named], book: AuctionContext) -> list[str]:
    return [bid.node for bid in award(task, named, book).bids]


def test_after_a_newcomer_has_failed_the_owners_others_come_after_all_other_bidders() -> None:
    named = [
        *bids("acme", "n2", "n3", rating=1.0),
        *bids("acme", "good", rating=0.1),
        *bids("local", "weak", rating=0.1),
        *bids("beta", "new"),
    ]
    book = book_of(known("good", "acme", 0.9))
    assert set(ranked(failed("n1", "acme"), named, book)[-2:]) == {"acme.n2", "acme.n3"}
    assert set(ranked(failed("new", "beta"), named, book)[:2]) != {"local.weak"}
    last = award(failed("n1", "acme"), named, book).bids
    assert [bid.comes_last for bid in last] == [False, False, False, True, True]
    assert ranked(failed("n1", "acme"), named[:2], book) != [], "they are not excluded"


def test_the_failure_of_a_proven_node_does_not_concern_its_owners_newcomers() -> None:
    named = [*bids("acme", "n2", rating=1.0), *bids("local", "weak", rating=0.1)]
    book = book_of(known("good", "acme", 0.9))
    assert ranked(failed("good", "acme"), named, book) == ["acme.n2", "weak"]
    assert ranked(failed("n1", "local"), [*bids("local", "n2", rating=1.0), *named[1:]], AuctionContext()) == [
        "n2",
        "weak",
    ]


# -- what a score rests on


def test_pending_and_judged_attempts_of_all_newcomers_count_as_each_ones() -> None:
    task, bid = envelope(ad(), now=0), Bid(node_id="n3", self_rating=0.8)
    profiles = known("n1", "acme", 0.25, count=4), known("good", "acme", 0.9), known("n9", "beta", 0.0)
    book = book_of(*profiles)
    pending = {("acme.n2", "code"): 2, ("acme.good", "code"): 5, ("acme.n1", "data"): 7, ("n1", "code"): 3}
    book = AuctionContext(book.profiles, pending_awards=pending, newcomers=book.newcomers)
    scored = score(task, key("h1", "acme"), bid, book, 10)
    own = AuctionContext({"n3": known("n3", "local", 0.25, count=4)}, pending_awards={("n3", "code"): 2})
    alone = score(task, key("h1"), bid, own, 10)
    assert (scored.trust, scored.bonus) == (alone.trust, alone.bonus)
    assert (scored.count, scored.evidence, scored.shared_count) == (0, None, 4)


def test_a_node_that_has_proved_itself_is_scored_by_its_own_evidence_alone() -> None:
    task, bid = envelope(ad(), now=0), Bid(node_id="good", self_rating=0.8)
    book = book_of(known("good", "acme", 0.5), known("n1", "acme", 0.0), known("n2", "acme", 0.49))
    scored = score(task, key("h1", "acme"), bid, book, 20)
    alone = score(task, key("h1"), bid, book_of(known("good", "local", 0.5)), 20)
    assert replace(scored, owner="local") == alone


steps = st.lists(
    st.tuples(
        st.sampled_from(["acme.a", "acme.b", "beta.a", "a"]),
        st.dictionaries(st.sampled_from(["code", "data"]), st.sampled_from([None, 0.0, 0.4, 0.5, 1.0])),
    )
)


@given(steps)
def test_after_any_changes_the_newcomers_are_those_of_the_last_profiles(
    changes: list[tuple[str, dict[str, float | None]]],
) -> None:
    newcomers, last = Newcomers(), dict[str, dict[str, DomainEvidence]]()
    for node, means in changes:
        last[node] = {
            token: DomainEvidence() if mean is None else DomainEvidence(count=3, mean=mean)
            for token, mean in means.items()
        }
        newcomers.update(node, last[node])
        for owner, token in product(("acme", "beta", "local"), ("code", "data")):
            expected = [
                domains[token]
                for node, domains in last.items()
                if node.startswith(f"{owner}.") and token in domains and domains[token].count
                if domains[token].mean < 0.5
            ]
            shared = newcomers.shared_evidence(owner, token, 2, lambda evidence: 0.5 + evidence.mean, 1.0)
            attempts = [3 * (0.5 + evidence.mean) for evidence in expected]
            rewards = sum(share * evidence.mean for share, evidence in zip(attempts, expected, strict=True))
            assert shared.attempts == pytest.approx(sum(attempts), abs=1e-9)
            assert shared.mean == pytest.approx(rewards / sum(attempts) if expected else 0.0, abs=1e-9)
            assert (shared.pending, shared.rewarded) == (2, 3 * len(expected))
    assert all(group.evidence for group in newcomers._groups.values()), "an empty group is forgotten"


def test_an_auction_weighs_only_newcomers_whose_evidence_has_changed() -> None:
    newcomers, weighed = Newcomers(), list[float]()

    def weight(evidence: DomainEvidence) -> float:
        weighed.append(evidence.mean)
        return 1.0

    def auctions(at: float, count: int) -> None:
        for _ in range(count):
            newcomers.shared_evidence("acme", "code", 0, weight, at)

    for number in range(1000):
        newcomers.update(f"acme.n{number}", {"code": DomainEvidence(count=1, mean=0.25)})
    auctions(100.0, 50)
    assert len(weighed) == 1000
    newcomers.update("acme.n7", {"code": DomainEvidence(count=2, mean=0.4)})
    auctions(101.0, 50)
    assert weighed[1000:] == [0.4]
    auctions(100.0 + WEIGHED_FOR_S, 50)
    assert len(weighed) == 2001, "evidence fades"
