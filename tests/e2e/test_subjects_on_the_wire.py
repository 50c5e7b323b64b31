"""The messages of a whole cluster, received by a plain NATS client: all rows of the table of subjects, nothing else."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Self

import nats
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg as Message
from support.nodes import node
from support.services import QUICK_START, running_phases
from support.subject_table import PATTERNS, pattern_of
from support.wait import until

from loom import delegate
from loom.agents.host.timings import HostTimings
from loom.bus.bus import Bus
from loom.bus.rewards import RewardBus
from loom.bus.subjects import Subjects
from loom.bus.tap import SHAPES
from loom.phases.adapt.timings import AdaptTimings
from loom.runner.services import running_nodes
from loom.schemas.base import decode
from loom.schemas.config import ClusterConfig
from loom.schemas.learning.reward import Reward
from loom.schemas.notices import read_scale_message
from loom.schemas.run import RunRequest, read_events

READERS: dict[str, Callable[[bytes], Any]] = {
    "task": read_scale_message,
    "later": read_scale_message,
    "event": read_events,
}
"""How messages are read that are of several types, or several in one."""
UNUSED = {"call.<owner>.<host_id>"}
"""Rows that node hosts listen to and that nothing publishes yet."""
CONFIG = ClusterConfig(idle_timeout_s=0.3)
PLAN = [{"id": "a", "description": "quick"}, {"id": "b", "description": "quick", "dependencies": ["a"]}]


class Wire:
    """A raw subscription on everything in a namespace."""

    def __init__(self, url: str, namespace: str) -> None:
        self.url, self.namespace = url, namespace
        self.subjects = Subjects(namespace)
        self.seen: dict[str, list[Message]] = {}
        """Row of the table -> its messages; under "" what is outside the table."""

    async def __aenter__(self) -> Self:
        self.client: Client = await nats.connect(self.url)
        await self.client.subscribe(f"{self.namespace}.>", cb=self._keep, pending_msgs_limit=0)
        await self.client.flush()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()

    async def _keep(self, msg: Message) -> None:
        self.seen.setdefault(pattern_of(msg.subject, self.namespace) or "", []).append(msg)

    async def ask(self, subject: str, **body: Any) -> dict[str, Any]:
        """Send a request as any NATS client would, and return the answer."""
        answer = await self.client.request(f"{self.namespace}.{subject}", json.dumps(body).encode(), timeout=30)
        return dict(json.loads(answer.data))

    def unreadable(self) -> list[str]:
        """Subjects of messages whose bodies are not of the type that the tap has for them."""
        return [msg.subject for found in self.seen.values() for msg in found if not self._is_readable(msg)]

    def _is_readable(self, msg: Message) -> bool:
        parsed = self.subjects.parse(msg.subject)
        if parsed is None or parsed.family not in SHAPES or parsed.task_id == "junk":
            return True
        try:
            read = READERS.get(parsed.family, partial(decode, shape=SHAPES[parsed.family]))
            read(msg.data)
        except ValueError:
            return False
        return True


class Work:
    """The agent of the cluster's node: `quick` work, work that is `held`, and work that is delegated."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.held: list[str] = []

    async def __call__(self, job: RunRequest) -> AsyncIterator[str]:
        if job.description == "held":
            self.held.append(job.task_id)
            await self.go.wait()
        if job.description == "delegate":
            yield await delegate("quick", domain="code")
        yield f"done: {job.description}"


TIMINGS = replace(QUICK_START, host=HostTimings(announce_s=0.2), adapt=AdaptTimings(sweep_s=0.1))


@pytest.fixture
async def wire(on_bus: tuple[str, str]) -> AsyncIterator[Wire]:
    async with Wire(*on_bus) as wire:
        yield wire


async def test_a_cluster_at_work_publishes_every_row_of_the_table_and_nothing_else(wire: Wire) -> None:
    work = Work()
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        await enter(running_phases(wire.url, namespace=wire.namespace, config=CONFIG, timings=TIMINGS))
        hosted = [node("ann", work, code=0.9)]
        await enter(
            running_nodes(wire.url, lambda: hosted, namespace=wire.namespace, slots=2, max_nodes=2, timings=TIMINGS)
        )
        client = await enter(Bus(wire.url, namespace=wire.namespace))

        await _submit_and_look(wire)
        await _grow_and_cancel(wire, work)
        await _reward(client)
        await wire.client.publish(f"{wire.namespace}.task.match.normal.junk", b"junk")
        expected = PATTERNS - UNUSED
        await until(lambda: expected <= set(wire.seen), within_s=30, what=f"{expected - set(wire.seen)}")

    assert [msg.subject for msg in wire.seen.get("", [])] == [], "outside the table"
    assert sorted(UNUSED & set(wire.seen)) == [], "published by now: take it out of UNUSED"
    assert wire.unreadable() == []


async def _submit_and_look(wire: Wire) -> None:
    """By the plain subjects and by name; whole, divided and with a part that is delegated."""
    plain = await wire.ask("submit", domain="code", description="quick", task_id="whole")
    named = await wire.ask("from.acme.submit", domain="code", description="quick", task_id="named")
    divided = await wire.ask("submit", domain="code", description="all", task_id="divided", context={"plan": PLAN})
    delegated = await wire.ask("submit", domain="code", description="delegate", task_id="delegated")
    assert [one["state"] for one in (plain, named, divided, delegated)] == ["succeeded"] * 4
    assert (await wire.ask("status.whole"))["state"] == "succeeded"
    assert (await wire.ask("from.acme.status.named"))["state"] == "succeeded"
    results = {msg.subject for msg in wire.seen["result.<submitter>.<task_id>"]}
    assert {f"{wire.namespace}.result.{task}" for task in ("public.whole", "acme.named", "public.divided")} <= results
    events = [json.loads(msg.data) for msg in wire.seen["subtask.<submitter>.<parent_id>"]]
    reported = [(event["subtask"], event["state"], event.get("child_state")) for event in events]
    assert reported == [(name, *of) for name in "ab" for of in (("begun", None), ("ended", "succeeded"))]


async def _grow_and_cancel(wire: Wire, work: Work) -> None:
    """More work than the node has slots makes the host start another node, which retires when all is over."""
    names = [f"held{n}" for n in range(5)]
    for name in names:
        ad = {"domain": "code", "description": "held", "task_id": name, "wait": False}
        await wire.ask("submit" if name != "held0" else "from.acme.submit", **ad)
    await until(lambda: "spawn" in wire.seen, what="SCALE asks for a node")
    assert (await wire.ask("from.acme.cancel.held0"))["state"] == "cancelled"
    assert (await wire.ask("cancel.held1"))["state"] == "cancelled"
    await until(lambda: work.held, what="some of them run")
    work.go.set()


async def _reward(client: Bus) -> None:
    """A person's opinion of a task, as `loom reward add` publishes it."""
    facts: dict[str, Any] = {"task_id": "whole", "attempt": 1, "node_id": "ann", "domain_token": "code"}
    reward = Reward(reward_id="whole:1:person", source="person", score=1.0, ended_at=client.clock.now(), **facts)
    await RewardBus(bus=client).publish(reward)
