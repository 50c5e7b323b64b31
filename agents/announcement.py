"""What a host announces of its nodes."""

from collections.abc import Mapping, Sequence
from typing import Any

from loom.agents.child import Child
from loom.agents.node import Node, Room


def facts_of(nodes: Sequence[Node], rooms: Mapping[str, Room], slots: int) -> dict[str, Any]:
    """Return the fields of a HostAnnouncement that follow from its nodes.

    Args:
        nodes: The nodes that have an agent.
        rooms: Node id -> its room, for nodes that have had work.
        slots: Runs each node works on at once.
    """
    ids = sorted(node.id for node in nodes)
    used = {node_id: rooms[node_id] for node_id in ids if node_id in rooms}
    return {
        "nodes": tuple(ids),
        "slots": slots * len(ids),
        "running": sum(len(room.running) for room in used.values()),
        "queued": sum(room.queued for room in used.values()),
        "busy": tuple(node_id for node_id, room in used.items() if room.has_work),
        "spawned": tuple(node.state() for node in nodes if isinstance(node, Child)),
    }
