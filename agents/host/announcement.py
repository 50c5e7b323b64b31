"""Builds the announcement of a host from its nodes."""

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from loom.agents.host.clone import SpawnedNode
from loom.agents.host.slots import Node, RunQueues
from loom.agents.user_code import ends_task, error_fields
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

_UNNAMED_DOMAIN = "a domain that no node names"


def node_fields(nodes: Sequence[Node], queues: RunQueues) -> dict[str, Any]:
    """Return the fields of a HostAnnouncement that depend on its nodes."""
    ordered = sorted(nodes, key=lambda node: node.id)
    used = {node.id: queues.by_node[node.id] for node in ordered if node.id in queues.by_node}
    return {
        "nodes": tuple(_announced_or_id(node, queues.slots) for node in ordered),
        "running": sum(len(queue.running) for queue in used.values()),
        "queued": sum(queue.queued for queue in used.values()),
        "busy": tuple(node_id for node_id, queue in used.items() if queue.has_work),
        "spawned": tuple(node.state() for node in nodes if isinstance(node, SpawnedNode)),
    }


def _announced_or_id(node: Node, slots: int) -> AnnouncedNode:
    """Return a node for an announcement; a node that raises is announced by its id alone."""
    try:
        return announced_node(node, slots)
    except BaseException as error:  # a node may be of a user's class, which may raise anything
        if ends_task(error):
            raise
        log.error("node_raised", node_id=node.id, **error_fields(error))
        return AnnouncedNode(node_id=node.id, slots=slots)


def announced_node(node: Node, slots: int) -> AnnouncedNode:
    """Return a node for an announcement: the domains it names, and its rating of all other domains if it is above 0.

    Only the first 64 domains and tools are announced; the node bids in all of its domains.

    Args:
        slots: Runs that the node works on at once.
    """
    other_rating = node.claim(_UNNAMED_DOMAIN)
    by_token: dict[str, AnnouncedDomain] = {}
    for domain in node.named_domains():
        by_token.setdefault(domain_token(domain), _domain(domain, node.claim(domain)))
    domains = list(by_token.values())
    if len(domains) >= ANNOUNCED_NAMES:
        domains = domains[: ANNOUNCED_NAMES - 1]
        other_rating = max(other_rating, NEUTRAL)  # covers the domains that are left out
    if other_rating > 0:
        domains.append(_domain(ANY_DOMAIN, other_rating))
    only_any = [domain.domain for domain in domains] == [ANY_DOMAIN] and other_rating == NEUTRAL
    return AnnouncedNode(
        node_id=node.id,
        domains=None if only_any else tuple(domains),
        tools=tuple(cut_name(tool) for tool in sorted(node.tool_names()))[:ANNOUNCED_NAMES],
        slots=slots,
    )


def fit_size(announcement: HostAnnouncement) -> HostAnnouncement:
    """Return an announcement of at most 64 KiB; the nodes of a longer one lose their domains and tools."""
    if len(encode(announcement)) <= MAX_ANNOUNCEMENT_BYTES:
        return announcement
    return replace(announcement, nodes=tuple(replace(node, domains=None, tools=()) for node in announcement.nodes))


def _domain(name: str, rating: float) -> AnnouncedDomain:
    return AnnouncedDomain(domain=cut_name(name), self_rating=None if rating == NEUTRAL else rating)
