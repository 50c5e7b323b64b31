"""ClusterManager of loom-agent 0.6: the nodes of one process, and an auction among them."""

from collections.abc import Sequence

from loom.compat.types import Bid
from loom.nodes import AgentNode, unit
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import LoomError
from loom.schemas.task import TaskAd
from loom.schemas.tokens import is_token

WEIGHTS = {"capability": 0.4, "availability": 0.25, "history": 0.2, "tools": 0.15}
"""Weight of each term of a bid; their sum is 1."""


class InvalidNode(LoomError):
    """A node that cannot be added; `node_id` names it."""

    code = "invalid_node"


class ClusterManager:
    """Holds nodes by id, in the order they were added, and finds the best one for a task.

    Args:
        config: Kept for its owner to read; phases take their rules from a Runtime or a LifecycleManager.
    """

    def __init__(self, config: ClusterConfig | None = None) -> None:
        self.config = config or ClusterConfig()
        self._nodes: dict[str, AgentNode] = {}

    @property
    def nodes(self) -> list[AgentNode]:
        """A new list of the present nodes."""
        return list(self._nodes.values())

    def add_node(self, node: AgentNode) -> None:
        """Add `node`; it replaces a node with the same id.

        Raises:
            InvalidNode: The id cannot be part of a subject.
        """
        if not is_token(node.id):
            raise InvalidNode("a node id is 1 to 64 of A-Z, a-z, 0-9, _ and -", node_id=node.id)
        self._nodes[node.id] = node

    def get_node(self, node_id: str) -> AgentNode | None:
        """Return the node with that id, or None."""
        return self._nodes.get(node_id)

    def remove_node(self, node_id: str) -> AgentNode | None:
        """Remove and return the node with that id, or return None."""
        return self._nodes.pop(node_id, None)

    def find_idle(self) -> AgentNode | None:
        """Return the first idle node, or None."""
        return next((node for node in self._nodes.values() if node.status == "idle"), None)

    def update_load(self, node_id: str, load: float) -> None:
        """Set a node's load, clamped to [0, 1]; no effect if no node has that id, as after its retirement."""
        node = self._nodes.get(node_id)
        if node is not None:
            node.load = unit(load)

    def compute_bid(self, node: AgentNode, task: TaskAd) -> Bid:
        """Return the bid of `node` for `task`: the weighted sum of four terms, each in [0, 1]."""
        profile = node.capabilities
        parts = {
            "capability": profile.score(task.domain),
            "availability": 1.0 - unit(node.load),
            "history": unit(profile.success_rate),
            "tools": profile.tool_share(task.required_tools),
        }
        score = sum(WEIGHTS[name] * value for name, value in parts.items())
        return Bid(agent_id=node.id, task_id=task.task_id, score=score, breakdown=parts)

    def collect_bids(self, task: TaskAd) -> list[Bid]:
        """Return the bids of all nodes that may run `task`, best first; equal ones in the order of addition.

        Only idle and busy nodes bid, and only if their `domains` include that of the ad. For a pinned ad, only its node
        bids.
        """
        bids = [
            self.compute_bid(node, task)
            for node in self._nodes.values()
            if node.status in ("idle", "busy")
            and (task.node_id == node.id or (task.node_id is None and _allows(node, task)))
        ]
        return sorted(bids, key=lambda bid: bid.score, reverse=True)

    def select_winner(self, task: TaskAd | Sequence[Bid]) -> AgentNode | None:
        """Return the node with the best bid on an ad, or among bids collected before; None without any.

        A busy node's load has already lowered its bid, so it may still beat an idle one. Bids of nodes that
        have left since are passed over.
        """
        bids = self.collect_bids(task) if isinstance(task, TaskAd) else task
        present = [bid for bid in bids if bid.agent_id in self._nodes]
        best = max(present, key=lambda bid: bid.score, default=None)
        return self._nodes[best.agent_id] if best else None


def _allows(node: AgentNode, ad: TaskAd) -> bool:
    """Whether the node's `domains` hold that of an ad; an ad without one fits every node."""
    return node.domains is None or not ad.domain or node.takes(ad.domain)
