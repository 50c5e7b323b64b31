"""The index of announced nodes, and the announcements that change nothing in it."""

from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.auctions import key, nodes

from loom.bus import host_directory
from loom.bus.bus import Bus
from loom.bus.host_directory import ALIVE_S, AnnouncedHost, AnnouncementReader
from loom.bus.logs.discards import Discards
from loom.bus.natsio.transport.message import Msg
from loom.phases.match.announced_nodes import AnnouncedNodes, TaskRequirements
from loom.phases.match.directory import HostDirectory
from loom.schemas.auction import AnnouncedDomain, AnnouncedNode, HostAnnouncement
from loom.schemas.base import encode
from loom.schemas.identity import qualified
from loom.schemas.tokens import domain_token

DOMAINS, TOOLS = ("code", "data", "Sales", "*"), ("shell", "web", "sql")


def message(host: str, body: HostAnnouncement | bytes) -> Msg:
    return Msg(f"loom.host.local.{host}", data=body if isinstance(body, bytes) else encode(body))


# -- the index


node = st.builds(
    AnnouncedNode,
    node_id=st.sampled_from([f"n{n}" for n in range(6)]),
    domains=st.none()
    | st.lists(
        st.builds(AnnouncedDomain, domain=st.sampled_from(DOMAINS), self_rating=st.sampled_from([0.0, 0.5, 1.0])),
        max_size=3,
    ).map(tuple),
    tools=st.lists(st.sampled_from(TOOLS), max_size=4).map(tuple),
    plain=st.booleans(),
)
hosts = st.lists(st.tuples(st.sampled_from(["h1", "h2", "h3"]), st.lists(node, max_size=4).map(tuple)), max_size=8)
requirements = st.builds(
    TaskRequirements,
    st.sampled_from(["code", "data", "sales", "unknown"]),
    st.frozensets(st.sampled_from(TOOLS), max_size=2),
    st.lists(st.sampled_from(["n0", "n1"]), max_size=2),
)


@given(hosts, requirements, st.booleans(), st.frozensets(st.sampled_from(["h1", "h2"])))
def test_the_index_finds_what_a_scan_of_all_nodes_finds(
    announcements: list[tuple[str, tuple[AnnouncedNode, ...]]],
    wanted: TaskRequirements,
    plain: bool,
    without: frozenset[str],
) -> None:
    index, present = AnnouncedNodes(), dict[str, dict[str, AnnouncedNode]]()
    for host, its_nodes in announcements:
        index.update(AnnouncedHost(host_id=host, nodes=its_nodes))
        present[host] = {node.node_id: node for node in its_nodes}
    if announcements:
        index.remove_host(key(announcements[0][0]))
        present.pop(announcements[0][0])
    scanned = {
        (key(host), node_id)
        for host, its in present.items()
        for node_id, node in its.items()
        if host not in without and node.plain == plain and accepts(node, node_id, wanted)
    }
    excepted = frozenset(map(key, without))
    found = [location for location, _ in index.capable_nodes(wanted, plain=plain, except_hosts=excepted)]
    assert len(found) == len(set(found))
    assert set(found) == scanned
    for host in present:
        index.remove_host(key(host))
    assert (index.size, index._by_domain, index._by_tool) == (0, {}, {})


def accepts(node: AnnouncedNode, node_id: str, wanted: TaskRequirements) -> bool:
    takes = node.domains is None or any(
        named.domain == "*" or domain_token(named.domain) == wanted.domain_token for named in node.domains
    )
    return (
        takes
        and node.self_rating(wanted.domain_token) > 0
        and wanted.tools <= set(node.tools)
        and qualified("local", node_id) not in wanted.excluded
    )


def count_checks(index: AnnouncedNodes, wanted: TaskRequirements, **facts: Any) -> int:
    """Return how many nodes are checked until a search ends."""
    with patch.object(index, "_is_capable", return_value=False) as check:
        assert not any(index.capable_nodes(wanted, plain=False, **facts))
    return int(check.call_count)


def test_a_search_considers_nodes_of_the_domain_or_of_the_tool_only() -> None:
    index = AnnouncedNodes()
    for number in range(50):
        code = AnnouncedDomain(domain="code", self_rating=0.5)
        coders = nodes(f"n{number}", domains=(code,), tools=("shell",))
        index.update(AnnouncedHost(host_id=f"h{number}", nodes=coders))
    index.update(AnnouncedHost(host_id="special", nodes=nodes("rare", tools=("sql",))))
    assert count_checks(index, TaskRequirements("code", frozenset(), ())) == 51
    assert count_checks(index, TaskRequirements("data", frozenset(), ())) == 1
    assert count_checks(index, TaskRequirements("code", frozenset({"sql"}), ())) == 1
    assert count_checks(index, TaskRequirements("code", frozenset({"none"}), ())) == 0
    answered = frozenset(key(f"h{number}") for number in range(50))
    assert count_checks(index, TaskRequirements("code", frozenset(), ()), except_hosts=answered) == 1


# -- announcements that repeat the nodes of the last one


def test_repeated_nodes_are_not_decoded_again() -> None:
    reader = AnnouncementReader(Discards())
    first = reader.read(message("h1", HostAnnouncement(seq=1, nodes=nodes("n1", "n2"))))
    with patch.object(host_directory, "_decoded", side_effect=AssertionError):
        again = reader.read(message("h1", HostAnnouncement(seq=2, nodes=nodes("n1", "n2"), running=3, busy=("n1",))))
    assert first is not None
    assert again is not None
    assert again.nodes is first.nodes
    assert (again.seq, again.running, again.busy) == (2, 3, ("n1",))
    other = reader.read(message("h1", HostAnnouncement(seq=3, nodes=nodes("n1"))))
    assert other is not None
    assert other.node_ids == ("n1",)


def test_the_nodes_of_a_removed_host_are_decoded_again_and_its_order_is_kept() -> None:
    reader = AnnouncementReader(Discards())
    reader.read(message("h1", HostAnnouncement(seq=5, nodes=nodes("n1"))))
    reader.forget_nodes(key("h1"))
    assert reader.read(message("h1", HostAnnouncement(seq=4, nodes=nodes("n1")))) is None
    later = reader.read(message("h1", HostAnnouncement(seq=6, nodes=nodes("n1"))))
    assert later is not None
    assert later.node_ids == ("n1",)


@pytest.mark.parametrize("body", [b"nonsense", b'{"nodes": 5}', b'{"nodes": [{"node_id": "a b"}]}', b'{"seq": -1}'])
def test_an_undecodable_announcement_is_counted_each_time(body: bytes) -> None:
    discards = Discards()
    reader = AnnouncementReader(discards)
    assert [reader.read(message("h1", body)) for _ in range(2)] == [None, None]
    assert discards.counts["announcement_undecodable"] == 2


def test_a_tolerated_announcement_is_read_as_before() -> None:
    reader = AnnouncementReader(Discards())
    body = b'\xef\xbb\xbf{"seq": "7", "nodes": [{"node_id": "n1", "slots": "4"}], "busy": null}'
    for _ in range(2):
        read = reader.read(message("h1", body))
        assert read is not None
        assert (read.seq, read.node_ids, read.slots, read.busy) == (7, ("n1",), 4, ())


async def test_an_announcement_without_changes_is_a_sign_of_life_and_nothing_else() -> None:
    directory = HostDirectory(Bus("nats://127.0.0.1:1"))
    with patch("loom.phases.match.directory.time") as clock:
        clock.monotonic.return_value = 1000.0
        directory._on_announcement(message("h1", HostAnnouncement(seq=1, nodes=nodes("n1", "n2"))))
        clock.monotonic.return_value += ALIVE_S - 1
        with patch.object(directory._ownership, "record_announcement", side_effect=AssertionError):
            directory._on_announcement(message("h1", HostAnnouncement(seq=2, nodes=nodes("n1", "n2"))))
        clock.monotonic.return_value += ALIVE_S - 1
        assert directory.host_of("n1") == key("h1")
        assert directory.nodes.announcement_count(key("h1")) == 2
        clock.monotonic.return_value += 2
        assert directory.host_of("n1") is None
        directory._on_announcement(message("h1", HostAnnouncement(seq=3, nodes=nodes("n1", "n2"))))
        assert directory.host_of("n1") == key("h1")
