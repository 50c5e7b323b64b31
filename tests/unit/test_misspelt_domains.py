from typing import Any

import pytest
from support.auctions import announced, key
from support.builders import ad, envelope
from support.nodes import echo, node

from loom.agents.host.announcement import announced_node
from loom.agents.host.clone import SpawnedNode
from loom.phases.match.announced_nodes import AnnouncedNodes
from loom.phases.match.misspelt_domains import CACHE_S, MAX_CACHED, MisspeltDomains
from loom.schemas.auction import AnnouncedDomain, AnnouncedNode
from loom.schemas.text.nearest_name import MOST_NAMES, nearest_domain
from loom.types import AgentNode

SENTENCE = "no node rates itself in 'sael'; did you mean 'sales'?"


def known(*nodes: AgentNode | SpawnedNode | AnnouncedNode) -> AnnouncedNodes:
    """The announced nodes of one host."""
    there = AnnouncedNodes()
    shapes = tuple(one if isinstance(one, AnnouncedNode) else announced_node(one, 4) for one in nodes)
    there.update(announced("h1", nodes=shapes))
    return there


def warned(*nodes: AgentNode | SpawnedNode | AnnouncedNode, domain: str = "sael", **facts: Any) -> str:
    return MisspeltDomains(known(*nodes)).warning_for(envelope(ad(domain=domain), now=0, **facts))


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


def test_the_number_of_comparisons_is_bounded() -> None:
    assert nearest_domain("sael", [*(f"x{number}" for number in range(MOST_NAMES)), "sales"]) is None
    assert nearest_domain("a" * 10_000, ["a" * 9_000]) == "a" * 9_000


# -- what nodes have announced


def test_an_unknown_domain_causes_a_warning_with_the_nearest_one() -> None:
    rated, limited = node("n1", echo, sales=0.9), AgentNode(id="n2", agent=echo, domains=["CSV files"])
    assert warned(rated, limited) == SENTENCE
    assert "did you mean 'CSV files'?" in warned(rated, limited, domain="CVS files")
    assert warned(rated, limited, domain="poetry") == ""
    for named in ("sales", "Sales ", "csv FILES"):
        assert warned(rated, limited, domain=named) == ""


def test_a_rating_of_zero_names_no_domain() -> None:
    nought = AnnouncedNode(node_id="n1", domains=(AnnouncedDomain(domain="sales", self_rating=0.0),))
    assert warned(nought) == warned(node("n1", echo, sales=0.0)) == ""


def test_nodes_without_domains_and_no_nodes_cause_no_warning() -> None:
    assert warned(node("n1", echo)) == warned() == ""


def test_a_node_started_for_a_domain_names_it_and_the_domains_of_its_template() -> None:
    child = SpawnedNode("n1-c1", node("n1", echo, sales=0.9), "law")
    assert warned(child, domain="law") == ""
    assert warned(child) == SENTENCE


def test_an_ad_without_a_domain_or_with_the_warning_gets_no_new_warning() -> None:
    rated = node("n1", echo, sales=0.9)
    assert warned(rated, domain="") == "", "SENSE has found the domain"
    assert warned(rated, warnings=(SENTENCE,)) == ""


def test_a_domain_has_its_most_common_spelling_and_is_dropped_with_its_hosts() -> None:
    there = AnnouncedNodes()
    for number, domain in enumerate(("Sales", "sales", "sales")):
        nodes = (AnnouncedNode(node_id="n", domains=(AnnouncedDomain(domain=domain),)),)
        there.update(announced(f"h{number}", nodes=nodes))
    assert list(there.domains()) == ["sales"]
    there.remove_host(key("h1"))
    there.remove_host(key("h2"))
    assert list(there.domains()) == ["Sales"]
    there.remove_host(key("h0"))
    assert (list(there.domains()), there.has_domain("sales"), there.size) == ([], False, 0)


def test_nearest_domains_are_cached_briefly_and_within_a_bound() -> None:
    now = 100.0
    there = known(node("n1", echo, sales=0.9))
    misspelt = MisspeltDomains(there, lambda: now)
    task = envelope(ad(domain="sael"), now=0)
    assert misspelt.warning_for(task) == SENTENCE
    there.remove_host(key("h1"))
    assert misspelt.warning_for(task) == SENTENCE
    now += CACHE_S
    assert misspelt.warning_for(task) == ""
    for number in range(3 * MAX_CACHED):
        misspelt.warning_for(envelope(ad(domain=f"d{number}"), now=0))
    assert len(misspelt._nearest) <= MAX_CACHED
