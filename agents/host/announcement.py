"""What a host announces of its nodes."""

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from loom.agents.host.clone import SpawnedNode
from loom.agents.host.slots import Node, RunQueue
from loom.agents.user_code import ends_task, error_text_fields
from loom.bus.logs.logger import get_logger
from loom.schemas.auction import (
    ANNOUNCED_NAMES,
    ANY_DOMAIN,
    MAX_ANNOUNCEMENT_BYTES,
    NEUTRAL,
    AnnouncedDomain,
    AnnouncedNode,
    HostAnnouncement,
)
from loom.schemas.base import cut_name, encode
from loom.schemas.tokens import domain_token

log = get_logger()

_ELSEWHERE = "a domain that no node names"


def facts_of(nodes: Sequence[Node], rooms: Mapping[str, RunQueue], slots: int) -> dict[str, Any]:
    """Return the fields of a HostAnnouncement that follow from its nodes.

    Args:
        nodes: The nodes that have an agent.
        rooms: Node id -> its room, for nodes that have had work.
        slots: Runs each node works on at once.
    """
    ordered = sorted(nodes, key=lambda node: node.id)
    used = {node.id: rooms[node.id] for node in ordered if node.id in rooms}
    return {
        "nodes": tuple(_announced(node, slots) for node in ordered),
        "running": sum(len(room.running) for room in used.values()),
        "queued": sum(room.queued for room in used.values()),
        "busy": tuple(node_id for node_id, room in used.items() if room.has_work),
        "spawned": tuple(node.state() for node in nodes if isinstance(node, SpawnedNode)),
    }


def _announced(node: Node, slots: int) -> AnnouncedNode:
    """Return a node as it is announced; one whose code raises is announced by its id."""
    try:
        return announced(node, slots)
    except BaseException as error:  # a node may be a user's class: its fault is not that of the others
        if ends_task(error):
            raise
        log.error("node_raised", node_id=node.id, **error_text_fields(error))
        return AnnouncedNode(node_id=node.id, slots=slots)


def announced(node: Node, slots: int) -> AnnouncedNode:
    """Return a node as its host announces it: the domains it names, and its rating in all others if it takes them.

    Of more than 64 domains or tools the first ones are announced: the node bids in all of them.
    """
    others = node.claim(_ELSEWHERE)
    named: dict[str, AnnouncedDomain] = {}
    for domain in node.named_domains():
        named.setdefault(domain_token(domain), _domain(domain, node.claim(domain)))
    domains = list(named.values())
    if len(domains) >= ANNOUNCED_NAMES:
        domains, others = domains[: ANNOUNCED_NAMES - 1], max(others, NEUTRAL)  # those left out are not announced
    if others > 0:
        domains.append(_domain(ANY_DOMAIN, others))
    return AnnouncedNode(
        node_id=node.id,
        domains=None if [domain.domain for domain in domains] == [ANY_DOMAIN] and others == NEUTRAL else tuple(domains),
        tools=tuple(cut_name(tool) for tool in sorted(node.tool_names()))[:ANNOUNCED_NAMES],
        slots=slots,
    )


def fitted(announcement: HostAnnouncement) -> HostAnnouncement:
    """Return an announcement of at most 64 KiB: a longer one names its nodes without their domains and tools."""
    if len(encode(announcement)) <= MAX_ANNOUNCEMENT_BYTES:
        return announcement
    return replace(announcement, nodes=tuple(replace(node, domains=None, tools=()) for node in announcement.nodes))


def _domain(name: str, rating: float) -> AnnouncedDomain:
    return AnnouncedDomain(domain=cut_name(name), self_rating=None if rating == NEUTRAL else rating)
