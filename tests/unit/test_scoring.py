import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.auctions import key
from support.builders import ad, envelope

from loom.phases.match.award_policies import POLICIES, Trust
from loom.phases.match.calls.offers import HostOffer
from loom.phases.match.ranked_bids import AllBusy, Awarded, Exhausted, NoOffers, award, decide, tie_break
from loom.phases.match.scoring import AuctionContext, score
from loom.schemas.auction import Bid
from loom.schemas.envelope import Envelope
from loom.schemas.learning.profile import DomainEvidence, NodeProfile, Score

H1, H2 = key("h1"), key("h2")


def env(task_id: str = "t1", tools: tuple[str, ...] = (), excluded: tuple[str, ...] = ()) -> Envelope:
    return envelope(ad(task_id=task_id, required_tools=tools), now=0, excluded=excluded)


def offer(host: str, *bids: Bid, decline: Any = None) -> HostOffer:
    return HostOffer(host_id=host, bids=bids, decline=decline)


def profile(node: str, count: int, mean: float, *, domain_token: str = "code", last_seq: int = 1) -> NodeProfile:
    scores = (Score(attempt_id="r", score=mean, ended_at=0),)
    return NodeProfile(
        node_id=node, last_seq=last_seq, domains={domain_token: DomainEvidence(scores=scores, count=count, mean=mean)}
    )


def knowing(known: NodeProfile, exploration: float = 0.3) -> AuctionContext:
    return AuctionContext({known.node_id: known}, exploration=exploration)


def judged(envelope: Envelope, *offers: HostOffer) -> Any:
    return decide(envelope, offers, AuctionContext())


def test_a_score_without_evidence_rests_on_the_claim() -> None:
    scored = score(env(), H1, Bid(node_id="n1", self_rating=0.9, load=0.5), AuctionContext(), 0)
    assert scored.score == pytest.approx(0.6 * 0.9 + 0.25 * 0.5 + 0.15)
    assert (scored.evidence, scored.count, scored.bonus, scored.trust) == (None, 0, 0, pytest.approx(0.9))


def test_evidence_outweighs_the_claim_which_counts_as_two_observations() -> None:
    scored = score(env(), H1, Bid(node_id="n1", self_rating=1.0), knowing(profile("n1", 8, 0.25)), 20)
    bonus = 0.3 * math.sqrt(math.log(21) / 10)
    assert scored.bonus == pytest.approx(bonus)
    assert scored.trust == pytest.approx((8 * 0.25 + 2) / 10 + bonus)
    assert (scored.evidence, scored.count) == (0.25, 8)
    assert scored.score == pytest.approx(0.6 * scored.trust + 0.25 + 0.15)


def test_evidence_of_another_domain_counts_for_nothing() -> None:
    bid = Bid(node_id="n1", self_rating=0.5)
    assert score(env(), H1, bid, knowing(profile("n1", 50, 1.0, domain_token="data")), 0) == score(
        env(), H1, bid, AuctionContext(), 0
    )


def test_evidence_is_looked_up_by_slug_whatever_the_wording() -> None:
    chinese = envelope(ad(domain="代码"), now=0)
    known = profile("n1", 8, 1.0, domain_token=chinese.domain_token)
    assert score(chinese, H1, Bid(node_id="n1"), knowing(known), 8).count == 8


def test_a_high_self_rating_with_many_failures_loses_to_a_modest_one() -> None:
    boaster, modest = Bid(node_id="boaster", self_rating=1.0), Bid(node_id="modest", self_rating=0.5)
    profiles = {"boaster": profile("boaster", 30, 0.0), "modest": profile("modest", 30, 0.9)}
    assert award(env(), [(H1, boaster), (H2, modest)], AuctionContext(profiles)).node_id == "modest"


def test_the_busier_of_equals_loses() -> None:
    bids = [(H1, Bid(node_id="busy", load=0.9, backlog=3)), (H2, Bid(node_id="idle", load=0.1))]
    won = award(env(), bids, AuctionContext())
    assert (won.node_id, won.host_id, won.backlog) == ("idle", "h2", 0)


def test_the_award_has_the_best_sixteen_bids_and_their_evidence() -> None:
    bids = [(H1, Bid(node_id=f"n{i}", self_rating=i / 30)) for i in range(30)]
    profiles = {"n29": profile("n29", 3, 1.0, last_seq=77), "n1": profile("n1", 3, 0.0, last_seq=12)}
    won = award(env(), bids, AuctionContext(profiles, exploration=0.0))
    assert won.node_id == won.bids[0].node_id == "n29"
    assert len(won.bids) == 16
    assert [bid.score for bid in won.bids] == sorted((bid.score for bid in won.bids), reverse=True)
    assert won.evidence_seq == 77
    assert won.score == won.bids[0].score


def test_the_award_names_the_policy_it_was_made_by() -> None:
    book = AuctionContext(policy=POLICIES["random"], policy_name="random")
    assert award(env(), [(H1, Bid(node_id="n1"))], book).policy == "random"


def test_exploration_counts_a_node_once_even_if_it_is_on_two_hosts() -> None:
    twice = [(H1, Bid(node_id="n1")), (H2, Bid(node_id="n1"))]
    won = award(env(), twice, knowing(profile("n1", 6, 0.5)))
    assert won.bids[0].bonus == pytest.approx(0.3 * math.sqrt(math.log(7) / 8))


def test_ties_are_stable_for_a_task_and_spread_over_tasks() -> None:
    bids = [(H1, Bid(node_id=f"n{i}")) for i in range(4)]
    winners = {task: award(env(task), bids, AuctionContext()).node_id for task in map(str, range(200))}
    again = {task: award(env(task), bids[::-1], AuctionContext()).node_id for task in winners}
    assert winners == again
    assert min(Counter(winners.values()).values()) > 25


@given(st.permutations(range(6)))
def test_the_order_of_arrival_never_decides(order: list[int]) -> None:
    bids = [(key(f"h{i % 2}"), Bid(node_id=f"n{i // 2}", self_rating=0.5)) for i in range(6)]
    assert award(env(), [bids[i] for i in order], AuctionContext()) == award(env(), bids, AuctionContext())


def test_a_bid_without_all_required_tools_is_ignored() -> None:
    needs = env(tools=("search", "shell"))
    half, whole = (
        Bid(node_id="half", self_rating=1.0, tools=("search",)),
        Bid(node_id="whole", tools=("shell", "search")),
    )
    verdict = judged(needs, offer("h1", half, whole))
    assert isinstance(verdict, Awarded)
    assert [bid.node_id for bid in verdict.award.bids] == ["whole"]
    assert isinstance(judged(needs, offer("h1", half)), NoOffers)


def test_an_excluded_node_is_not_awarded_even_if_its_host_offers_it() -> None:
    verdict = judged(
        env(excluded=("n1",)), offer("h1", Bid(node_id="n1", self_rating=1.0)), offer("h2", Bid(node_id="n2"))
    )
    assert isinstance(verdict, Awarded)
    assert verdict.award.node_id == "n2"
    assert isinstance(judged(env(excluded=("n1",)), offer("h1", Bid(node_id="n1"))), Exhausted)


@pytest.mark.parametrize(
    ("excluded", "declines", "verdict"),
    [
        ((), [], NoOffers),
        ((), ["unqualified"], NoOffers),
        ((), ["busy", "unqualified"], AllBusy),
        ((), ["draining"], NoOffers),
        (("n1",), [], NoOffers),
        (("n1",), ["unqualified"], Exhausted),
        (("n1",), ["busy", "unqualified"], AllBusy),
        (("n1",), ["unqualified", "draining"], NoOffers),
    ],
)
def test_an_auction_without_bids_leads_to_a_verdict_by_its_declines(
    excluded: tuple[str, ...], declines: list[str], verdict: type
) -> None:
    offers = [offer(f"h{i}", decline=why) for i, why in enumerate(declines)]
    assert isinstance(judged(env(excluded=excluded), *offers), verdict)


unit = st.floats(0, 1)


@given(unit, unit, st.integers(0, 120), unit, st.integers(0, 10_000), st.floats(0, 2))
def test_scores_are_finite_for_any_evidence(
    claim: float, load: float, count: int, mean: float, total: int, exploration: float
) -> None:
    bid = Bid(node_id="n1", self_rating=claim, load=load)
    scored = score(env(), H1, bid, knowing(profile("n1", count, mean), exploration), total)
    assert 0 <= scored.score < 20


@given(unit, unit, st.integers(0, 120), unit)
def test_a_better_claim_never_scores_lower(low: float, high: float, count: int, mean: float) -> None:
    low, high = sorted((low, high))
    known = profile("n1", count, mean)
    scores = [
        score(env(), H1, Bid(node_id="n1", self_rating=claim), knowing(known), count).score for claim in (low, high)
    ]
    assert scores[0] <= scores[1] + 1e-12


@given(st.lists(st.tuples(st.sampled_from("abcdefghijklmnopqrst"), st.sampled_from([0.2, 0.5, 0.8])), max_size=40))
def test_an_award_remembers_its_bids_by_score_then_by_the_tie_break_of_the_task_then_by_host(
    made: list[tuple[str, float]],
) -> None:
    bids = [(H1, Bid(node_id="n1", self_rating=0.1))] + [
        (key(f"h{number}"), Bid(node_id=node, self_rating=claim)) for number, (node, claim) in enumerate(made, 2)
    ]
    scored = [score(env(), host, bid, AuctionContext(), 0) for host, bid in bids]
    ordered = sorted(scored, key=lambda bid: (-bid.score, tie_break("t1", bid.node_id), bid.host_id))
    assert award(env(), bids, AuctionContext()).bids == tuple(ordered[:16])


def test_an_award_names_the_winning_bid() -> None:
    bids = (Bid(node_id="n1", self_rating=0.9, backlog=2, expected_s=0.1), Bid(node_id="n2", self_rating=0.1))
    verdict = judged(env(), offer("h1", *bids), offer("h2", bids[1]))
    assert isinstance(verdict, Awarded)
    assert verdict.bid == bids[0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_a_policy_with_trust_out_of_range_is_refused_even_for_one_bid(value: float) -> None:
    book = AuctionContext(policy=lambda known: Trust(value if known.node_id == "n30" else 0.5), policy_name="mine:odd")
    with pytest.raises(ValueError, match="mine:odd"):
        award(env(), [(key("h"), Bid(node_id=f"n{number}")) for number in range(40)], book)


def test_idle_knowledge_fades_towards_the_claim() -> None:
    known = profile("n1", 8, 1.0)
    fresh, halved, old = (
        score(
            env(), H1, Bid(node_id="n1", self_rating=0.0), AuctionContext({"n1": known}, now=now, half_life_s=100), 8
        ).trust
        for now in (0, 100, 10_000)
    )
    bonus = 0.3 * math.sqrt(math.log(9) / 2)
    assert fresh == pytest.approx(8 / 10 + 0.3 * math.sqrt(math.log(9) / 10))
    assert halved == pytest.approx(4 / 6 + 0.3 * math.sqrt(math.log(9) / 6))
    assert old == pytest.approx(bonus)
