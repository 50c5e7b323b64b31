"""Nodes of this process: agents with their ratings, tools and history."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from loom.schemas import auction
from loom.schemas.learning.profile import WINDOW, DomainEvidence, NodeProfile
from loom.schemas.tokens import domain_token

NodeStatus = Literal["idle", "busy", "splitting", "dying"]

NEUTRAL = 0.5
"""Rating of a node without evidence."""
RATING_WEIGHT = 2
"""Number of rewards as which a node's self-rating counts."""


def short_id() -> str:
    """Return a random id of eight hex digits."""
    return uuid4().hex[:8]


def unit(value: float) -> float:
    """Return `value` clamped to [0, 1]; NaN counts as 0."""
    return value if 0 <= value <= 1 else min(1.0, max(0.0, value))


@dataclass
class CapabilityProfile:
    """Ratings, tools and success of a node."""

    scores: dict[str, float] = field(default_factory=dict)
    """domain (any wording) -> 0 useless to 1 expert."""
    tools: list[str] = field(default_factory=list)
    total_tasks: int = 0
    success_rate: float = NEUTRAL
    """0 to 1; 0.5 without evidence."""

    def key(self, domain: str) -> str:
        """Return the wording of `domain` in `scores`; `domain` itself if it is not in them.

        Two wordings with the same domain_token are one domain: `Code` and `code`, but not 代码 and 数据.
        """
        if domain in self.scores or not self.scores:
            return domain
        wanted = domain_token(domain)
        for name in self.scores:
            if domain_token(name) == wanted:
                return name
        return domain

    def score(self, domain: str) -> float:
        """Return the score in `domain`, in [0, 1]; 0.5 for a domain without one."""
        known = self.scores.get(domain)
        return unit(self.scores.get(self.key(domain), NEUTRAL) if known is None else known)

    def tool_share(self, required: Collection[str]) -> float:
        """Return the share of the required tools that the node has, each counted once; 1 if none is required."""
        wanted = set(required)
        return len(wanted.intersection(self.tools)) / len(wanted) if wanted else 1.0


@dataclass
class RewardRecord:
    """The reward of a node for one task."""

    task_id: str = ""
    reward: float = 0.0
    domain: str = ""
    token_cost: int = 0
    timestamp: float = field(default_factory=time.time)
    """Seconds since the epoch."""


@dataclass
class AgentNode:
    """An agent's place in a cluster. It can bid without an `agent`, but not run a task."""

    id: str = field(default_factory=short_id)
    parent_id: str | None = None
    depth: int = 0
    """Divisions between this node and one that a program added."""
    capabilities: CapabilityProfile = field(default_factory=CapabilityProfile)
    """A profile, or a dict of ratings, which becomes one."""
    reward_history: list[RewardRecord] = field(default_factory=list)
    """Oldest first, at most 120 per domain."""
    status: NodeStatus = "idle"
    load: float = 0.0
    """0 free to 1 full."""
    agent: Any = None
    last_active_at: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    consecutive_losses: int = 0
    blueprint_id: str | None = None
    decayed_at: float = 0.0
    """Seconds since the epoch of the last decay of its scores; 0: never."""
    domains: Collection[str] | None = None
    """Domains that the node accepts, in any wording; None: all. A pinned task needs none of them.

    Two wordings with the same domain_token are one domain, as in `capabilities`.
    """
    self_ratings: dict[str, float] = field(default_factory=dict)
    """domain -> original self-rating, if `capabilities.scores` shows the learned score instead."""
    _shown: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    """domain -> the learned score that `mirror` stored in `capabilities.scores`."""

    def __post_init__(self) -> None:
        if isinstance(self.capabilities, Mapping):
            self.capabilities = CapabilityProfile(scores=dict(self.capabilities))

    def takes(self, domain: str) -> bool:
        """Return whether the node accepts tasks of a domain (any wording, or its token): its rating is above 0."""
        return self.claim(domain) > 0

    def remember(self, *, task_id: str, domain: str, reward: float, token_cost: int, at: float) -> None:
        """Append a record to the history and drop the domain's oldest one beyond 120."""
        self.reward_history.append(RewardRecord(task_id, reward, domain, token_cost, at))
        same = [
            index
            for index, record in enumerate(self.reward_history)
            if domain_token(record.domain) == domain_token(domain)
        ]
        if len(same) > WINDOW:
            del self.reward_history[same[0]]

    def to_bid(self, *, domain: str, required_tools: Collection[str] = ()) -> auction.Bid:
        """Return the bid of this node for a task of `domain` (any wording, or its domain_token)."""
        tools: tuple[str, ...] = ()
        if required_tools:
            own = self.tool_names()
            tools = tuple(tool for tool in dict.fromkeys(required_tools) if tool in own)
        return auction.Bid(node_id=self.id, self_rating=self.claim(domain), load=unit(self.load), tools=tools)

    def tool_names(self) -> set[str]:
        """Return the names of the tools of the node and its agent."""
        return {*self.capabilities.tools, *getattr(self.agent, "tools", ())}

    def has_tools(self, required: Collection[str]) -> bool:
        """Return whether the node or its agent has all of these tools."""
        return not required or self.tool_names().issuperset(required)

    def claim(self, domain: str) -> float:
        """Return the self-rating in a domain (any wording, or its token), in [0, 1]; 0: the node refuses the domain.

        It is never a learned score: the auction combines the self-rating with the evidence.
        """
        if self.domains is not None:
            wanted = domain_token(domain)
            names = (self.domains,) if isinstance(self.domains, str) else self.domains
            if not any(domain_token(name) == wanted for name in names):
                return 0.0
        scores = self.capabilities.scores
        key = domain if domain in scores else self.capabilities.key(domain)
        ratings = self.self_ratings if self._shown and self._is_learned(key) else scores
        return unit(ratings.get(key, NEUTRAL))

    def named_domains(self) -> Collection[str]:
        """Return the domains with a self-rating above 0, or those to which the node is limited."""
        if self.domains is None:
            return [domain for domain in self.capabilities.scores if self.claim(domain) > 0]
        return (self.domains,) if isinstance(self.domains, str) else self.domains

    def _is_learned(self, key: str) -> bool:
        """Return whether a score is the one that `mirror` stored; a later one is a new self-rating."""
        return key in self._shown and self._shown[key] == self.capabilities.scores.get(key)

    def mirror(self, profile: NodeProfile) -> None:
        """Copy the learned profile of this node; its self-ratings are kept in `self_ratings`."""
        for name, evidence in profile.domains.items():
            if evidence.count:
                self._show(self.capabilities.key(name), evidence)
        known = self.capabilities
        known.total_tasks = profile.total_tasks
        known.success_rate = profile.success_rate if profile.total_tasks else NEUTRAL
        self.consecutive_losses = profile.consecutive_losses
        self.reward_history = sorted(
            (
                RewardRecord(entry.attempt_id.split(":")[0], entry.score, known.key(name), timestamp=entry.ended_at)
                for name, evidence in profile.domains.items()
                for entry in evidence.scores
            ),
            key=lambda record: record.timestamp,
        )
        if self.reward_history:
            self.last_active_at = max(self.last_active_at, self.reward_history[-1].timestamp)

    def _show(self, key: str, evidence: DomainEvidence) -> None:
        """Store the mean of rewards and self-rating as the score of a domain; the self-rating counts as two rewards."""
        scores = self.capabilities.scores
        if key in scores and not self._is_learned(key):
            self.self_ratings[key] = scores[key]
        rating = unit(self.self_ratings.get(key, NEUTRAL))
        learned = (evidence.mean * evidence.count + rating * RATING_WEIGHT) / (evidence.count + RATING_WEIGHT)
        scores[key] = self._shown[key] = learned
