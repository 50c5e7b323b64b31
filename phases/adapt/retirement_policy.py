"""Who retires, and who inherits what they have learned. Pure: announcements and profiles in, decisions out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from loom.bus.host_directory import AnnouncedHost, HostKey
from loom.phases.adapt.evidence import own_by_age
from loom.phases.adapt.reward_weights import INHERITED, own
from loom.phases.shared.node_health import HEALTH_WINDOW, complement, is_failing
from loom.schemas.config import ClusterConfig
from loom.schemas.identity import ADAPT, node_key
from loom.schemas.learning import NodeProfile, Reward


class Retirement(NamedTuple):
    """A child that is to go."""

    host: HostKey
    node_id: str
    reason: str
    when_idle: bool
    """Whether it may stay if it has got work meanwhile."""

    @property
    def key(self) -> str:
        """The key of its profile."""
        return node_key(self.host.owner, self.node_id)


def who_retires(
    hosts: Sequence[AnnouncedHost], profiles: Mapping[str, NodeProfile], config: ClusterConfig
) -> list[Retirement]:
    """Return the children that are failing, then those idle for `idle_timeout_s`, the longest first.

    Only children go, never a node that somebody has put there. One younger than `idle_timeout_s` is left alone, so
    that it has had its chance, and at most so many are named that `min_nodes` of the cluster stay.

    Args:
        profiles: By key.
    """
    spare = max(0, sum(len(staying(host)) for host in hosts) - config.min_nodes)
    grown = [
        (host.key, child)
        for host in hosts
        for child in host.spawned
        if not child.retiring and child.age_s >= config.idle_timeout_s
    ]
    failing, idle = [], []
    for key, child in sorted(grown, key=lambda one: (-one[1].idle_s, one[0], one[1].node_id)):
        if why := _failure(profiles.get(node_key(key.owner, child.node_id)), config):
            failing.append(Retirement(key, child.node_id, why, when_idle=False))
        elif child.idle_s > 0 and child.idle_s >= config.idle_timeout_s:
            idle.append(Retirement(key, child.node_id, f"idle for {child.idle_s:.0f} s", when_idle=True))
    return [*failing, *idle][:spare]


def heir(retired: NodeProfile, hosts: Sequence[AnnouncedHost], profiles: Mapping[str, NodeProfile]) -> str | None:
    """Return the id of the idle node that a retired one complements most, or None where there is none to inherit.

    Only a node of the same owner inherits: evidence is no gift to a stranger. While another host of the owner still
    has a node of that id none does, for its evidence is in use.

    Args:
        profiles: By key.
    """
    kin = [host for host in hosts if host.owner == retired.owner]
    if any(retired.node_id in staying(host) for host in kin):
        return None
    mine = _means(retired)
    gains = {
        other: complement(
            mine,
            _means(profiles.get(node_key(retired.owner, other))),
            min(host.running, max(host.slots, 1)) / max(host.slots, 1),
        )
        for host in kin
        for other in staying(host) - set(host.busy)
    }
    return min(gains, key=lambda other: (-gains[other], other), default=None)


def bequest(profile: NodeProfile, owner: str, node_id: str, why: str = "has retired") -> Iterator[Reward]:
    """Yield what a node inherits: for each domain the mean of what the other has earned itself, as one observation.

    Args:
        profile: The other's.
        owner: The heir's.
        node_id: The heir's.
        why: For people, with the other as its subject.
    """
    for domain_token, evidence in profile.domains.items():
        earned = own(evidence.scores)
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
    """Return the nodes of a host that are not on their way out."""
    return set(host.node_ids) - {child.node_id for child in host.spawned if child.retiring}


def newest_own(profile: NodeProfile) -> list[float]:
    """Return the last ten scores a node has earned itself, in whatever domain, oldest first."""
    return [score.score for score in own_by_age(profile.domains)[-HEALTH_WINDOW:]]


def _failure(profile: NodeProfile | None, config: ClusterConfig) -> str:
    """Why the node is failing; empty when it is not, or too little is known."""
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
