"""The explanation of an award, under each policy."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from support.auctions import key
from support.builders import ad, envelope
from support.strategies import messages

from loom.phases.match.award_policies import POLICIES
from loom.phases.match.ranked_bids import award as awarded
from loom.phases.match.scoring import AVAILABILITY_WEIGHT, TOOLS_WEIGHT, TRUST_WEIGHT, AuctionContext
from loom.runner.cli.views.award_explanation import TRUST, rests_on, why
from loom.schemas.auction import Award, Bid, ScoredBid, bids_json
from loom.schemas.base import decode, encode


def bid(node_id: str, **facts: float) -> ScoredBid:
    given = {"self_rating": 0.5, "load": 0.0, "tools": 1.0, "bonus": 0.0, **facts}
    given.setdefault("trust", given["self_rating"] + given["bonus"])
    score = TRUST_WEIGHT * given["trust"] + AVAILABILITY_WEIGHT * (1 - given["load"]) + TOOLS_WEIGHT * given["tools"]
    return ScoredBid(node_id=node_id, host_id="h", score=score, **given)  # type: ignore[arg-type]


def award(*bids: ScoredBid, **facts: Any) -> Award:
    return Award(
        node_id=bids[0].node_id, host_id="h", score=bids[0].score, bids_json=bids_json(map(encode, bids)), **facts
    )


@pytest.mark.parametrize("policy", ["", "glr_ucb", "ucb", "greedy"])
@pytest.mark.parametrize(
    ("bids", "sentence"),
    [
        ([bid("a", self_rating=0.9)], "a won with 0.94: no other node bid (a claim of 0.90 and no evidence)."),
        (
            [bid("a", self_rating=0.9), bid("b", self_rating=0.5)],
            "trusted more, for a claim of 0.90 and no evidence against",
        ),
        (
            [bid("a", trust=0.8, evidence=0.9, count=4), bid("b", self_rating=0.7)],
            "for a claim of 0.50 and a mean reward of 0.90 over 4 against a claim of 0.70 and no evidence",
        ),
        ([bid("a", bonus=0.4), bid("b", bonus=0.1)], "less is known about it, which earns a bonus of 0.40 against"),
        ([bid("a"), bid("b", load=0.5)], "it is less busy, 0% against 50%."),
        ([bid("a"), bid("b", tools=0.5)], "it has more of the tools, 100% against 50%."),
        ([bid("a", self_rating=0.9, load=0.5), bid("b")], "trusted more, .*, although it is busier, 50% against 0%"),
        ([bid("a"), bid("b")], "they are equal, and the task's id decided."),
    ],
)
def test_one_sentence_explains_the_award(policy: str, bids: list[ScoredBid], sentence: str) -> None:
    assert re.search(sentence.replace("(", r"\(").replace(")", r"\)"), why(award(*bids, policy=policy)))


@pytest.mark.parametrize(
    ("policy", "more", "less"),
    [
        ("thompson", "its draw is higher, 0.80 against 0.40.", "its draw is lower, 0.50 against 0.60."),
        ("random", "drawn at random, 0.80 against 0.40.", "its draw is lower, 0.50 against 0.60."),
        (
            "round_robin",
            "it has had fewer tasks of the domain lately.",
            "it has had more tasks of the domain lately.",
        ),
        ("shop:fair", "shop:fair trusts it more, 0.80 against 0.40.", "shop:fair trusts it less, 0.50 against 0.60."),
    ],
)
def test_trust_without_evidence_is_not_explained_by_evidence(policy: str, more: str, less: str) -> None:
    """The winner of all these has the worse evidence."""
    poor = {"evidence": 0.1, "count": 50, "self_rating": 0.1}
    good = {"evidence": 0.9, "count": 50, "bonus": 0.1}

    won = award(bid("a", trust=0.8, **poor), bid("b", trust=0.4, **good), policy=policy)
    assert why(won) == f"a won with 0.88 to 0.64 of b: {more}"
    busier = award(bid("a", trust=0.5, **poor), bid("b", trust=0.6, load=0.9, **good), policy=policy)
    assert why(busier) == f"a won with 0.70 to 0.54 of b: it is less busy, 0% against 90%, although {less}"
    assert why(award(bid("a", **poor), policy=policy)) == "a won with 0.46: no other node bid."


TOTAL = "total = 0.6 trust + 0.25 (1 - load) + 0.15 tools"


@pytest.mark.parametrize(
    ("policy", "known", "unknown", "trust"),
    [
        ("", "By rewards up to 7", "By claims alone: no rewards were known", "the bonus being part of trust"),
        (
            "ucb",
            "Policy ucb, by rewards up to 7",
            "Policy ucb, by claims alone: no rewards were known",
            "the bonus being part of trust",
        ),
        (
            "round_robin",
            "Policy round_robin, by rewards up to 7",
            "Policy round_robin, no rewards were known",
            "trust being 1 / (1 + tasks of the domain)",
        ),
        ("random", "Policy random", "Policy random", "trust being drawn at random"),
        (
            "shop:fair",
            "Policy shop:fair, by rewards up to 7",
            "Policy shop:fair, no rewards were known",
            "trust and bonus being its own",
        ),
    ],
)
def test_the_breakdown_lists_the_terms_of_trust(policy: str, known: str, unknown: str, trust: str) -> None:
    assert rests_on(award(bid("a"), policy=policy, evidence_seq=7)) == f"{known}; {TOTAL}, {trust}."
    assert rests_on(award(bid("a"), policy=policy)) == f"{unknown}; {TOTAL}, {trust}."


@pytest.mark.parametrize("name", POLICIES)
def test_every_built_in_policy_has_its_own_explanation(name: str) -> None:
    bids = [(key("h1"), Bid(node_id="a")), (key("h2"), Bid(node_id="b"))]
    won = awarded(envelope(ad(), now=0), bids, AuctionContext(policy=POLICIES[name], policy_name=name))

    assert name in TRUST
    assert TRUST[name] in rests_on(won)
    assert f"{name} trusts it" not in why(won)


def test_an_award_without_a_policy_is_explained_by_evidence() -> None:
    old = decode(encode(award(bid("a", self_rating=0.9), bid("b"))), Award)

    assert b"policy" not in encode(old)
    assert "it is trusted more, for a claim of 0.90" in why(old)


def test_newcomers_of_one_owner_are_explained_by_their_shared_evidence() -> None:
    first, second = bid("a", trust=0.6), replace(bid("b", trust=0.3), owner="acme", shared_count=7)
    assert "against a claim of 0.50 and the 7 attempts of acme's newcomers" in why(award(first, second))
    last = replace(bid("b", self_rating=0.9), owner="acme", comes_last=True)
    assert why(award(bid("a"), last)) == (
        "a won with 0.70 to 0.94 of acme.b, which comes last: another newcomer of the owner acme has failed the task."
    )


def test_an_award_without_an_auction_names_no_better_node() -> None:
    assert "pinned" in why(Award(node_id="a", host_id="h", pinned=True))
    assert why(Award(node_id="a", host_id="h")) == "a won; the bids are not known."


@given(st.lists(messages(ScoredBid), min_size=1, max_size=3), st.sampled_from(["", *POLICIES, "shop:fair"]))
def test_any_award_can_be_explained(bids: list[ScoredBid], policy: str) -> None:
    ranked = sorted(bids, key=lambda each: -each.score)

    sentence = why(replace(award(*ranked), bids_json=bids_json(map(encode, ranked)), policy=policy))

    assert sentence.startswith(f"{ranked[0].node} won with ")
    assert sentence.endswith(".")
