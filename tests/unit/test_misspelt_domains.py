from typing import Any

import pytest
from msgspec.structs import replace
from support.nodes import echo, node
from support.phases import ad, envelope

from loom.agents.child import Child
from loom.agents.domain_hints import FRESH_S, MOST_KEPT, DomainHints
from loom.phases.match.misspelt import warning_for
from loom.schemas.auction import Bid, CallForBids, Offer
from loom.schemas.near import MOST_NAMES, nearest_domain
from loom.schemas.task import domain_token
from loom.types import AgentNode

BID = (Bid(node_id="n1"),)


def calling(domain: str) -> CallForBids:
    token = domain_token(domain)
    return CallForBids(
        auction_id="a", task_id="t", attempt=1, domain_token=token, domain=domain, complexity=0.5, remaining_s=9
    )


def hint(domain: str, *nodes: AgentNode | Child, hints: DomainHints | None = None) -> tuple[bool, str]:
    offer = (hints or DomainHints()).completed(Offer(host_id="h"), calling(domain), nodes)
    return offer.unrated, offer.near


# -- likeness


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("sael", "Sales"),
        ("SALES ", "Sales"),
        ("salse", "Sales"),
        ("csv file", "CSV files"),
        ("数据分", "数据分析"),
        ("law", None),
        ("poetry", None),
        ("", None),
    ],
)
def test_only_a_domain_that_resembles_a_known_one_has_a_nearest(word: str, nearest: str | None) -> None:
    assert nearest_domain(word, ["lab", "Sales", "CSV files", "数据分析"]) == nearest


def test_what_is_compared_is_bounded() -> None:
    assert nearest_domain("sael", [*(f"x{number}" for number in range(MOST_NAMES)), "sales"]) is None
    assert nearest_domain("a" * 10_000, ["a" * 9_000]) == "a" * 9_000


# -- hosts


def test_a_host_names_the_nearest_domain_of_its_nodes_where_none_names_that_of_the_call() -> None:
    rated, limited = node("n1", echo, sales=0.9), AgentNode(agent=echo, domains=["CSV files"])
    assert hint("sael", rated, limited) == (True, "sales")
    assert hint("CVS files", rated, limited) == (True, "CSV files")
    assert hint("poetry", rated, limited) == (True, "")
    for named in ("sales", "Sales ", "csv FILES"):
        assert hint(named, rated, limited) == (False, "")


def test_a_rating_of_nought_names_a_domain_for_no_one() -> None:
    assert hint("sael", node("n1", echo, sales=0.0)) == (True, "")


def test_nodes_that_name_no_domain_have_no_hint() -> None:
    assert hint("sael", node("n1", echo)) == (True, "")
    assert hint("sael") == (True, "")


def test_a_node_started_for_a_domain_names_it_beside_its_templates() -> None:
    child = Child("n1-c1", node("n1", echo, sales=0.9), "law")
    assert hint("law", child) == (False, "")
    assert hint("sael", child) == (True, "sales")


def test_what_is_found_is_kept_for_a_moment_and_never_too_much() -> None:
    now = 100.0
    hints = DomainHints(lambda: now)
    assert hint("sael", node("n1", echo, sales=0.9), hints=hints) == (True, "sales")
    assert hint("sael", node("n1", echo), hints=hints) == (True, "sales")
    assert hint("sael", node("n1", echo), node("n2", echo, sael=0.9), hints=hints) == (False, ""), "a node has come"
    now += FRESH_S
    assert hint("sael", node("n1", echo), hints=hints) == (True, "")
    for number in range(3 * MOST_KEPT):
        hint(f"d{number}", hints=hints)
    assert len(hints._kept) <= MOST_KEPT


# -- MATCH

UNRATED = Offer(host_id="h1", bids=BID, unrated=True, near="sales")


def warned(*offers: Offer, domain: str = "sael", **facts: Any) -> str:
    return warning_for(envelope(ad(domain=domain), now=0, **facts), offers)


def test_a_domain_that_no_node_names_is_warned_of_with_the_nearest_one() -> None:
    sentence = "no node rates itself in 'sael'; did you mean 'sales'?"
    assert warned(UNRATED) == sentence
    assert warned(UNRATED, Offer(host_id="h2", bids=BID, unrated=True, near="saddle")) == sentence
    assert warned(Offer(host_id="h1", decline="unqualified", unrated=True, near="sales")) == sentence
    assert warned(UNRATED, Offer(host_id="h2", decline="draining")) == sentence


@pytest.mark.parametrize(
    "other",
    [
        Offer(host_id="h2", bids=BID),
        Offer(host_id="h2", decline="busy"),
    ],
)
def test_one_host_whose_nodes_name_the_domain_is_enough(other: Offer) -> None:
    assert warned(UNRATED, other) == ""


def test_there_is_no_warning_without_a_similar_domain_a_domain_in_the_ad_or_an_answer() -> None:
    assert warned(replace(UNRATED, near="")) == ""
    assert warned(replace(UNRATED, near="poetry")) == ""
    assert warned(replace(UNRATED, near="SAEL")) == "", "the same domain in other words"
    assert warned(UNRATED, domain="") == "", "SENSE has found the domain"
    assert warned() == ""


def test_a_task_is_warned_of_once() -> None:
    before = envelope(ad(domain="sael"), now=0).warned(warned(UNRATED)).warnings
    assert warned(replace(UNRATED, near="saul"), warnings=before) == ""
