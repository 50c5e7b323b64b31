"""A node started on request: a clone of another, or the first with a skill."""

import asyncio
import time
from collections.abc import Collection, Iterable
from itertools import count
from typing import Any, Literal

from msgspec.structs import replace

from loom.agents.host.slots import Node
from loom.schemas.auction import Bid, ChildState
from loom.schemas.learning import NodeProfile
from loom.schemas.tokens import domain_token

CLAIM = 0.5
STEM = 56
"""Characters of a template's id its children keep, so that a number fits behind them."""


class SpawnedNode:
    """A node that shares its template's agent and tools, and has an id, a claim and evidence of its own.

    It claims 0.5 in the domain it was wanted for; in any other no more than that, nor than its template does. It takes
    no domain that its template does not.

    Args:
        node_id: Who it is.
        template: The node it is a clone of; of the same id: a node of its own, with a skill, that nobody hosts.
        wanted: Slug of the domain it was wanted for.
    """

    def __init__(self, node_id: str, template: Node, wanted: str) -> None:
        self.id = node_id
        self.agent: Any = template.agent
        self.parent_id = template.id
        self.depth: int = getattr(template, "depth", 0) + 1
        self.load = 0.0
        self.status: Literal["idle", "busy", "dying"] = "idle"
        self.free = asyncio.Event()
        """Set while it has nothing in hand."""
        self.free.set()
        self._template = template
        self._wanted = wanted
        self._born = self._free_since = time.monotonic()

    @property
    def is_clone(self) -> bool:
        """Whether it is a copy of a node of another name."""
        return self.id != self.parent_id

    @property
    def origin(self) -> str:
        """What it was made of, for people."""
        return f"clone of {self.parent_id}" if self.is_clone else f"skill {getattr(self.agent, 'name', self.id)}"

    @property
    def has_work(self) -> bool:
        """Whether it has work in hand, queued or begun; its host keeps it."""
        return not self.free.is_set()

    @has_work.setter
    def has_work(self, value: bool) -> None:
        if value:
            self.free.clear()
        elif self.has_work:
            self._free_since = time.monotonic()
            self.free.set()

    def to_bid(self, *, domain: str, required_tools: Collection[str] = ()) -> Bid:
        """Return its offer: its template's, with a claim of its own."""
        offer = self._template.to_bid(domain=domain, required_tools=required_tools)
        return replace(offer, node_id=self.id, self_rating=self.claim(domain), load=self.load)

    def claim(self, domain: str) -> float:
        """Return what it claims: 0.5 in the domain it was wanted for, else no more than that, nor than its template."""
        return CLAIM if domain_token(domain) == self._wanted else min(CLAIM, self._template.claim(domain))

    def named_domains(self) -> Collection[str]:
        """Return its template's domains and the one it was wanted for."""
        return (*self._template.named_domains(), self._wanted)

    def tool_names(self) -> Collection[str]:
        """Return the tools it has: its template's."""
        return self._template.tool_names()

    def has_tools(self, required: Collection[str]) -> bool:
        """Return whether it has all of these tools: its template's."""
        return self._template.has_tools(required)

    def mirror(self, profile: NodeProfile) -> None:
        """Take note of nothing: the auction weighs what has been learned, and nobody else looks here."""

    def state(self) -> ChildState:
        """Return how it fares now."""
        now = time.monotonic()
        return ChildState(
            node_id=self.id,
            parent_id=self.parent_id,
            age_s=now - self._born,
            idle_s=0.0 if self.has_work else now - self._free_since,
            retiring=self.status == "dying",
        )


def child_id(template_id: str, taken: Iterable[str]) -> str:
    """Return the first of `<template>-c1`, `<template>-c2`, … that nobody has.

    The same numbers on every host: evidence is about the agent, wherever its clones run, and a child started again
    goes on with what its number has earned.
    """
    used = set(taken)
    names = (f"{template_id[:STEM]}-c{number}" for number in count(1))
    return next(name for name in names if name not in used)
