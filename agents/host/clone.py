"""A node started on request: a clone of another node, or the first node with a skill."""

import asyncio
import time
from collections.abc import Collection, Iterable
from itertools import count
from typing import Any, Literal

from msgspec.structs import replace

from loom.agents.host.slots import Node
from loom.schemas.auction import Bid, ChildState
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.tokens import domain_token

SELF_RATING = 0.5
STEM = 56
"""Characters of a template's id that its clones keep, so that a number fits after them."""


class SpawnedNode:
    """A node that shares the agent and tools of its template, with its own id, self-rating and evidence.

    It rates itself 0.5 in the domain it was spawned for. In other domains its rating is at most 0.5, and at most that
    of its template.

    Args:
        node_id: Id of the new node.
        template: The node that is cloned; a template with the same id is the node of a skill and is not hosted itself.
        spawned_for: Token of the domain that the node is spawned for.
    """

    def __init__(self, node_id: str, template: Node, spawned_for: str) -> None:
        self.id = node_id
        self.agent: Any = template.agent
        self.parent_id = template.id
        self.depth: int = getattr(template, "depth", 0) + 1
        self.load = 0.0
        self.status: Literal["idle", "busy", "dying"] = "idle"
        self.idle = asyncio.Event()
        """Set while the node has no work."""
        self.idle.set()
        self._template = template
        self._spawned_for = spawned_for
        self._spawned_at = self._idle_since = time.monotonic()

    @property
    def is_clone(self) -> bool:
        """Whether the node is a copy of a node with another id."""
        return self.id != self.parent_id

    @property
    def origin(self) -> str:
        """A description of the template for people."""
        return f"clone of {self.parent_id}" if self.is_clone else f"skill {getattr(self.agent, 'name', self.id)}"

    @property
    def has_work(self) -> bool:
        """Whether a run is queued or has started; set by the host."""
        return not self.idle.is_set()

    @has_work.setter
    def has_work(self, value: bool) -> None:
        if value:
            self.idle.clear()
        elif self.has_work:
            self._idle_since = time.monotonic()
            self.idle.set()

    def to_bid(self, *, domain: str, required_tools: Collection[str] = ()) -> Bid:
        """Return the bid of the template with the node's own id, self-rating and load."""
        offer = self._template.to_bid(domain=domain, required_tools=required_tools)
        return replace(offer, node_id=self.id, self_rating=self.claim(domain), load=self.load)

    def claim(self, domain: str) -> float:
        """Return the node's self-rating in a domain, 0 to 0.5."""
        if domain_token(domain) == self._spawned_for:
            return SELF_RATING
        return min(SELF_RATING, self._template.claim(domain))

    def named_domains(self) -> Collection[str]:
        """Return the template's domains and the one the node was spawned for."""
        return (*self._template.named_domains(), self._spawned_for)

    def tool_names(self) -> Collection[str]:
        """Return the names of the template's tools."""
        return self._template.tool_names()

    def has_tools(self, required: Collection[str]) -> bool:
        """Return whether the template has all of these tools."""
        return self._template.has_tools(required)

    def mirror(self, profile: NodeProfile) -> None:
        """Do nothing: MATCH weighs the learned profile, and a spawned node is not visible to user code."""

    def state(self) -> ChildState:
        """Return the node's age, idle time and whether it is retiring, for an announcement."""
        now = time.monotonic()
        return ChildState(
            node_id=self.id,
            parent_id=self.parent_id,
            age_s=now - self._spawned_at,
            idle_s=0.0 if self.has_work else now - self._idle_since,
            retiring=self.status == "dying",
        )


def clone_id(template_id: str, taken: Iterable[str]) -> str:
    """Return the first of `<template>-c1`, `<template>-c2`, … that is not taken.

    All hosts use the same numbers, because evidence is about the agent, not about the host of its clone. A clone that
    is started again continues with the evidence of its number.
    """
    taken_ids = set(taken)
    names = (f"{template_id[:STEM]}-c{number}" for number in count(1))
    return next(name for name in names if name not in taken_ids)
