"""Claims and domains of nodes, and adding and removing agents."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from loom import LoomError, Runtime
from loom.types import AgentNode, CapabilityProfile


def echo(text: str) -> str:
    return text


def test_capabilities_may_be_a_dict() -> None:
    node = Runtime().add_agent(echo, capabilities={"code": 0.9, "sales": Fraction(1, 2), "law": 1})

    assert node.capabilities.scores == {"code": 0.9, "sales": 0.5, "law": 1.0}
    assert node.takes("anything")


def test_a_profile_is_copied_for_each_node() -> None:
    profile, rt = CapabilityProfile(scores={"code": 0.9}, tools=["shell"]), Runtime()
    first, second = (rt.add_agent(echo, name=name, capabilities=profile).capabilities for name in ("a", "b"))
    first.scores["code"] = 0.1

    assert second.scores == {"code": 0.9}
    assert second.tools == ["shell"]


@pytest.mark.parametrize(
    ("capabilities", "sentence"),
    [
        ({"code": 9}, "the node has the rating 9 in 'code': give a number from 0"),
        ({"code": -0.1}, "the rating -0.1 in 'code'"),
        ({"code": float("nan")}, "the rating nan in 'code'"),
        ({"code": "high"}, "the rating a str in 'code'"),
        ({"code": True}, "the rating a bool in 'code'"),
        ({"code": None}, "the rating a NoneType in 'code'"),
        ({7: 0.5}, "a domain that is a int"),
        ({" ": 0.5}, "a domain that is empty"),
        (CapabilityProfile(scores={"code": 9}), "the rating 9 in 'code'"),
        (["code"], 'capabilities that are a list: give a dict such as {"code": 0.9}'),
    ],
)
def test_a_rating_that_is_not_a_number_from_0_to_1_is_refused(capabilities: Any, sentence: str) -> None:
    rt = Runtime()
    with pytest.raises(LoomError) as caught:
        rt.add_agent(echo, capabilities=capabilities)
    assert sentence in caught.value.message
    assert rt.cluster.nodes == []


def test_a_node_with_domains_accepts_only_these_in_any_wording() -> None:
    node = Runtime().add_agent(echo, domains=["Code", "代码"], capabilities={"code": 0.9, "law": 0.9})

    assert [node.takes(domain) for domain in ("code", " CODE ", "代码", "数据", "law", "general")] == [True] * 3 + [
        False
    ] * 3
    assert (node.claim("code"), node.claim("law")) == (0.9, 0.0)


@pytest.mark.parametrize(
    ("domains", "taken"), [("sales", ["sales"]), (("a", "b"), ["a", "b"]), (None, None), ({"a"}, ["a"])]
)
def test_domains_may_come_in_any_collection(domains: Any, taken: list[str] | None) -> None:
    assert Runtime().add_agent(echo, domains=domains).domains == taken


@pytest.mark.parametrize(
    ("domains", "sentence"),
    [
        ([], "no valid domains"),
        ("", "no valid domains"),
        (7, "no valid domains"),
        ([7], "a domain that is a int"),
        ([""], "a domain that is empty"),
    ],
)
def test_domains_that_name_nothing_are_refused(domains: Any, sentence: str) -> None:
    with pytest.raises(LoomError, match=sentence):
        Runtime().add_agent(echo, domains=domains)


def test_a_domain_rated_0_is_refused() -> None:
    node = AgentNode(capabilities=CapabilityProfile(scores={"code": 0.0}))
    assert not node.takes("code")
    assert node.takes("sales")


def test_a_taken_name_is_refused_with_the_way_to_replace_it() -> None:
    rt = Runtime()
    rt.add_agent(echo, name="a")
    with pytest.raises(LoomError, match=r"pass replace=True, or call remove_agent\('a'\) first"):
        rt.add_agent(echo, name="a")

    def other(text: str) -> str:
        return text

    assert rt.add_agent(other, name="a", replace=True).agent is other
    assert [node.agent for node in rt.cluster.nodes] == [other]
    assert rt.add_agent(echo, name="b", replace=True).id == "b"


def test_a_replacement_that_is_refused_leaves_the_old_node() -> None:
    rt = Runtime()
    rt.add_agent(echo, name="a")
    for refused in ({"capabilities": {"code": 9}}, {"domains": []}):
        with pytest.raises(LoomError):
            rt.add_agent(echo, name="a", replace=True, **refused)  # type: ignore[arg-type]
    assert rt.cluster.get_node("a") is not None


def test_a_removed_agent_is_gone_and_may_be_added_again() -> None:
    rt = Runtime()
    node = rt.add_agent(echo, name="a")

    assert rt.remove_agent("a") is node
    assert rt.cluster.nodes == []
    assert rt.add_agent(echo, name="a").id == "a"
    with pytest.raises(LoomError, match="there is not a node b; there are: a"):
        rt.remove_agent("b")


@pytest.mark.parametrize("agent", [AgentNode(agent=echo), lambda: AgentNode])
def test_a_node_is_not_an_agent(agent: AgentNode | Callable[[], Any]) -> None:
    with pytest.raises(LoomError, match=r"rt\.cluster\.add_node\(node\)|must take one argument"):
        Runtime().add_agent(agent)
