"""Decides which spawned nodes retire, and which nodes inherit their evidence. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from loom.bus.host_directory import AnnouncedHost, HostKey
from loom.phases.adapt.evidence import newest_first
from loom.phases.adapt.reward_weights import INHERITED, is_own, own_scores
from loom.phases.shared.node_health import HEALTH_WINDOW, complement, is_failing
from loom.schemas.config import ClusterConfig
from loom.schemas.identity import ADAPT, node_key
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward


class Retirement(NamedTuple):
    """A spawned node that is due to retire."""

    host: HostKey
    node_id: str
    reason: str
    when_idle: bool
    """Whether its host may decline because the node has work again."""

    @property
    def key(self) -> str:
        """The key of the node's profile."""
        return node_key(self.host.owner, self.node_id)


def due_retirements(
    hosts: Sequence[AnnouncedHost], profiles: Mapping[str, NodeProfile], config: ClusterConfig
) -> list[Retirement]:
    """Return the spawned nodes that are failing, then those idle for `idle_timeout_s`, the longest idle first.

    Only spawned nodes retire, never an original one. A node younger than `idle_timeout_s` is not considered. At least
    `min_nodes` nodes of the cluster stay.

    Args:
        hosts: The latest announcement of each host.
        profiles: The profiles, by key.
        config: Limits of idle time and failures, and the least number of nodes.
    """
    spare = max(0, sum(len(staying(host)) for host in hosts) - config.min_nodes)
    candidates = [
        (host.key, node)
        for host in hosts
        for node in host.spawned
        if not node.retiring and node.age_s >= config.idle_timeout_s
    ]
    failing, idle = [], []
    for key, node in sorted(
        candidates, key=lambda candidate: (-candidate[1].idle_s, candidate[0], candidate[1].node_id)
    ):
        if why := _failure(profiles.get(node_key(key.owner, node.node_id)), config):
            failing.append(Retirement(key, node.node_id, why, when_idle=False))
        elif node.idle_s > 0 and node.idle_s >= config.idle_timeout_s:
            idle.append(Retirement(key, node.node_id, f"idle for {node.idle_s:.0f} s", when_idle=True))
    return [*failing, *idle][:spare]


def heir(retired: NodeProfile, hosts: Sequence[AnnouncedHost], profiles: Mapping[str, NodeProfile]) -> str | None:
    """Return the id of the idle node that a retired one complements most; None without a candidate.

    Only a node of the same owner inherits. If another host of the owner still has a node of the retired id, no node
    inherits, for the evidence is still in use.

    Args:
        retired: Profile of the retired node.
        hosts: The latest announcement of each host.
        profiles: The profiles, by key.
    """
    owned = [host for host in hosts if host.owner == retired.owner]
    if any(retired.node_id in staying(host) for host in owned):
        return None
    means = _means(retired)
    gains = {
        node_id: complement(
            means,
            _means(profiles.get(node_key(retired.owner, node_id))),
            min(host.running, max(host.slots, 1)) / max(host.slots, 1),
        )
        for host in owned
        for node_id in staying(host) - set(host.busy)
    }
    return min(gains, key=lambda node_id: (-gains[node_id], node_id), default=None)


def inherited_rewards(profile: NodeProfile, owner: str, node_id: str, why: str = "has retired") -> Iterator[Reward]:
    """Yield the rewards that an heir gets: for each domain the mean of the scores that the other node earned itself.

    Args:
        profile: Profile of the other node.
        owner: Owner of the heir.
        node_id: Node id of the heir.
        why: Reason for people, a clause whose subject is the other node.
    """
    for domain_token, evidence in profile.domains.items():
        earned = own_scores(evidence.scores)
        if earned:
            yield Reward(
                reward_id=f"{INHERITED}{profile.name}",
                kind="inherit",
                task_id=profile.node_id,
                attempt=0,
                source=ADAPT,
                node_id=node_id,
                owner=owner,
                domain_token=domain_token,
                score=sum(score.score for score in earned) / len(earned),
                ended_at=max(score.ended_at for score in earned),
                reason=f"{len(earned)} tasks of {profile.name}, which {why}",
            )


def staying(host: AnnouncedHost) -> set[str]:
    """Return the ids of a host's nodes that are not retiring."""
    return set(host.node_ids) - {node.node_id for node in host.spawned if node.retiring}


def newest_own(profile: NodeProfile) -> list[float]:
    """Return the last ten scores that a node has earned itself, in all domains, oldest first."""
    own = (score.score for _, score in newest_first(profile.domains) if is_own(score))
    return list(islice(own, HEALTH_WINDOW))[::-1]


def _failure(profile: NodeProfile | None, config: ClusterConfig) -> str:
    """Return the reason why the node is failing; empty if it is not, or has too few scores."""
    if profile is None:
        return ""
    recent = newest_own(profile)
    if not is_failing(recent, profile.consecutive_losses, config):
        return ""
    if profile.consecutive_losses >= config.consecutive_loss_limit:
        return f"failed {profile.consecutive_losses} times in a row"
    return f"earned {sum(recent) / len(recent):.2f} on average over its last {len(recent)} tasks"


def _means(profile: NodeProfile | None) -> dict[str, float]:
    return {domain_token: evidence.mean for domain_token, evidence in profile.domains.items()} if profile else {}
