"""LifecycleManager of loom-agent 0.6: division (mitosis), health and retirement (apoptosis) of nodes."""

import time
from collections.abc import Iterable
from typing import Literal

from loom.compat.cluster_manager import ClusterManager
from loom.compat.types import HealthReport
from loom.nodes import NEUTRAL, AgentNode, CapabilityProfile, unit
from loom.phases.shared.node_health import HEALTH_WINDOW, Health, complement, health, standing
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import LoomError
from loom.schemas.task import Limits, TaskAd
from loom.schemas.tokens import domain_token

ADVICE: dict[Health, Literal["keep", "merge", "recycle"]] = {
    "healthy": "keep",
    "warning": "merge",
    "dying": "recycle",
}
"""Health of a node -> recommendation, in the terms of loom-agent 0.6."""


class MitosisError(LoomError):
    """The node may not divide; `node_id` names it."""

    code = "mitosis_failed"


class ApoptosisRejected(LoomError):
    """The node may not retire now; `node_id` names it."""

    code = "apoptosis_rejected"


class LifecycleManager:
    """Decides by the limits of a ClusterConfig; changes only its arguments."""

    def __init__(self, config: ClusterConfig | None = None) -> None:
        self.config = config or ClusterConfig()

    def should_split(self, task: TaskAd, node: AgentNode) -> bool:
        """Return whether the complexity of `task` exceeds the threshold and `node` may divide.

        Complexity is 0.5 without an estimate. The limits of the task only narrow those of the config.
        """
        limits = task.limits or Limits()
        threshold = max(self.config.mitosis_threshold, limits.mitosis_threshold or 0.0)
        depth = self.config.max_depth if limits.max_depth is None else min(self.config.max_depth, limits.max_depth)
        complexity = NEUTRAL if task.estimated_complexity is None else task.estimated_complexity
        return complexity > threshold and node.depth < depth

    def check_health(self, node: AgentNode, *, now: float | None = None) -> HealthReport:
        """Return the health of `node` at `now` (seconds since the epoch; default: the present).

        A node is dying after too many consecutive losses, or with too low a mean of ten rewards: recycle. After too
        long an idle time following work it is dying as well: merge. Half of the losses are a warning. A short history
        alone has no effect.
        """
        rewards = [record.reward for record in node.reward_history[-HEALTH_WINDOW:]]
        mean = sum(rewards) / len(rewards) if rewards else 0.0
        idle_s = 0.0 if node.status == "busy" else max(0.0, (time.time() if now is None else now) - node.last_active_at)
        status = health(rewards, node.consecutive_losses, self.config)
        report = HealthReport(node.id, status, mean, round(idle_s * 1000), ADVICE[status])
        report.standing = standing(rewards, node.consecutive_losses, self.config)
        if status != "dying" and rewards and idle_s > self.config.idle_timeout_s:
            report.status, report.recommendation = "dying", "merge"
        return report

    def check_all(self, nodes: Iterable[AgentNode], *, now: float | None = None) -> list[HealthReport]:
        """Return the health of each node, in order."""
        return [self.check_health(node, now=now) for node in nodes]

    def mitosis(self, parent: AgentNode, cluster: ClusterManager | None = None, *, domain: str = "") -> AgentNode:
        """Return a child of `parent` with its agent and tools, without history, with neutral self-ratings.

        Args:
            parent: It is not changed.
            cluster: The child is added to it.
            domain: Domain of the child; empty: those of its parent.

        Raises:
            MitosisError: `parent` is `max_depth` divisions deep, or the cluster has `max_nodes`.
        """
        if parent.depth >= self.config.max_depth:
            raise MitosisError(f"{parent.id} is {parent.depth} divisions deep already", node_id=parent.id)
        if cluster is not None and len(cluster.nodes) >= self.config.max_nodes:
            raise MitosisError(f"the cluster has its {self.config.max_nodes} nodes already", node_id=parent.id)
        claimed = [domain] if domain else parent.capabilities.scores
        child = AgentNode(
            parent_id=parent.id,
            depth=parent.depth + 1,
            capabilities=CapabilityProfile(dict.fromkeys(claimed, NEUTRAL), list(parent.capabilities.tools)),
            agent=parent.agent,
            blueprint_id=parent.blueprint_id,
        )
        if cluster is not None:
            cluster.add_node(child)
        return child

    def apoptosis(self, node: AgentNode, cluster: ClusterManager) -> AgentNode | None:
        """Remove `node` from `cluster`; return the idle node that inherits its capabilities, None without one.

        The heir has the greatest sum of score differences, reduced by up to half for its load.

        Raises:
            ApoptosisRejected: The node is working, is not in the cluster, or no more than `min_nodes` are left.
        """
        if cluster.get_node(node.id) is not node:
            raise ApoptosisRejected(f"{node.id} is not in the cluster", node_id=node.id)
        if node.status in ("busy", "splitting"):
            raise ApoptosisRejected(f"{node.id} is working: wait for the end of its run", node_id=node.id)
        if len(cluster.nodes) <= self.config.min_nodes:
            raise ApoptosisRejected(f"at least {self.config.min_nodes} nodes must stay", node_id=node.id)
        heirs = [other for other in cluster.nodes if other is not node and other.status == "idle"]
        heir = max(heirs, key=lambda other: _complement(node, other), default=None)
        if heir:
            self.merge_capabilities(node, heir)
        node.status = "dying"
        cluster.remove_node(node.id)
        return heir

    def merge_capabilities(self, source: AgentNode, target: AgentNode) -> None:
        """Merge the scores of `source` into `target`, weighted by their tasks, and add its tools.

        Two nodes without any task weigh the same.
        """
        given, own = source.capabilities, target.capabilities
        total = given.total_tasks + own.total_tasks
        share = given.total_tasks / total if total else 0.5
        for domain in given.scores:
            own.scores[own.key(domain)] = own.score(domain) * (1 - share) + given.score(domain) * share
        own.tools = list(dict.fromkeys([*own.tools, *given.tools]))


def _complement(node: AgentNode, other: AgentNode) -> float:
    return complement(_by_slug(node), _by_slug(other), unit(other.load))


def _by_slug(node: AgentNode) -> dict[str, float]:
    return {domain_token(domain): node.capabilities.score(domain) for domain in node.capabilities.scores}
