"""AmoebaLoop: one conversation through the six phases, as a stream of events."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from loom.bus import tasks
from loom.bus.client import Bus, Msg
from loom.bus.log import get_logger
from loom.bus.ownership import THREADSAFE, Owner
from loom.bus.reward_bus import RewardBus
from loom.bus.tasks import TaskHandle
from loom.cluster.lifecycle import LifecycleManager
from loom.cluster.manager import ClusterManager
from loom.cluster.planner import TaskPlanner
from loom.cluster.skill_nodes import skill_nodes
from loom.cluster.skill_registry import SkillNodeRegistry
from loom.cluster.subtasks import Subtasks
from loom.runner.session import Inheritance, Session
from loom.runner.session_owner import SessionOwner
from loom.runner.settings import from_environment
from loom.schemas.errors import InvalidTask
from loom.schemas.learning import Lifecycle
from loom.schemas.wire import Undecodable, decode
from loom.types import (
    AnyProvider,
    Done,
    ErrorEvent,
    LoopEvent,
    Message,
    SubtaskEvent,
    TaskAd,
    TaskResult,
    TextDelta,
    TokenUsage,
)

log = get_logger()

REWARDED = frozenset({"node_lost", "agent_failed", "rejected_result", "deadline_exceeded"})
"""Failures there is something to learn from, where a node had the task."""


@dataclass
class LoopContext:
    """What a conversation asks of the loop.

    Args:
        messages: The last user message is the task; earlier ones go along as its context.
        domain: Where it belongs; empty: SENSE decides.
        timeout_s: Seconds until the task is given up.
        token_budget: A hard limit of tokens; None: no limit.
    """

    messages: list[Message] = field(default_factory=list)
    domain: str = ""
    timeout_s: float = 300.0
    token_budget: int | None = None

    def to_ad(self) -> TaskAd:
        """Return the task.

        Raises:
            InvalidTask: No message of a user.
        """
        asked = [index for index, message in enumerate(self.messages) if message.role == "user"]
        if not asked:
            raise InvalidTask("no user message: say what is to be done", field="messages")
        earlier = [
            {"role": message.role, "content": message.content}
            for message in self.messages[: asked[-1]]
            if message.content
        ]
        return TaskAd(
            domain=self.domain,
            description=self.messages[asked[-1]].content,
            context={"conversation": earlier} if earlier else {},
            timeout_s=self.timeout_s,
            token_budget=self.token_budget,
        )


class AmoebaLoop:
    """Runs a conversation's task through SENSE, MATCH, SCALE, EXECUTE, EVALUATE and ADAPT.

    `execute` opens what it needs and closes it again; inside `async with loop` it stays open between calls.

    Args:
        cluster: Its nodes are hosted while the loop is open, read live.
        reward_bus: Gets a bus while the loop is open.
        lifecycle: Its config rules the phases started here.
        planner: For the caller's own use: the phases plan by themselves, and ask as it does.
        skill_registry: A skill a task calls for becomes a node when nobody bids. With skills in it as the loop
            opens, it hosts up to `max_nodes` nodes: those of skills, and clones of any that are overrun.
        llm: What SENSE may ask, and SCALE for a plan, where the phases are started here; and the model of skills.
    """

    def __init__(
        self,
        cluster: ClusterManager,
        reward_bus: RewardBus,
        lifecycle: LifecycleManager,
        planner: TaskPlanner,
        skill_registry: SkillNodeRegistry,
        llm: AnyProvider | None = None,
    ) -> None:
        self.cluster = cluster
        self.reward_bus = reward_bus
        self.lifecycle = lifecycle
        self.planner = planner
        self.skill_registry = skill_registry
        self.llm = llm
        self._sessions = SessionOwner(self._make_session)

    async def execute(self, ctx: LoopContext) -> AsyncIterator[LoopEvent]:
        """Yield what happens until the task has ended and has been learned from; the last event is Done.

        A failed attempt shows as a recoverable ErrorEvent before the next one begins, a failed task as a final
        ErrorEvent before Done. Of a divided task a SubtaskEvent tells when each part begins and ends.

        An iteration that is broken off cancels the task.

        Raises:
            InvalidTask: The context holds no task.
            BusUnavailable: No server or no phases answer.
            WrongEventLoop: The loop is open, by `async with`, in another event loop.
        """
        ad = ctx.to_ad()
        async with self._session() as session:
            self.reward_bus.bus = session.bus
            async with (
                _Learned(session.bus, ad.task_id, self.cluster) as learned,
                Subtasks(session.bus, ad.task_id) as parts,
                tasks.published(session.bus, ad, deltas=True, cancel_with_caller=True) as handle,
                aclosing(self._follow(handle, parts, learned)) as events,
            ):
                async for event in events:
                    yield event

    async def _follow(
        self, handle: TaskHandle, parts: Subtasks, learned: "_Learned"
    ) -> AsyncGenerator[LoopEvent, None]:
        started = time.monotonic()
        text, attempt = "", 1
        async with aclosing(parts.follow(handle)) as deltas:
            async for delta in deltas:
                if isinstance(delta, SubtaskEvent):
                    yield delta
                    continue
                if delta.attempt > attempt:
                    text, attempt = "", delta.attempt
                    yield ErrorEvent(error="the attempt failed; another node takes over", recoverable=True)
                if isinstance(delta.event, TextDelta):
                    text += delta.event.text
                yield delta.event
        result = await handle.result()
        if result.content != text and result.content.startswith(text):
            yield TextDelta(text=result.content[len(text) :])  # deltas may get lost, the result does not
        if result.error is not None:
            yield ErrorEvent(error=result.error.message, code=result.error.code)
        if result.node_id is not None and (result.error is None or result.error.code in REWARDED):
            await learned.wait(self.lifecycle.config.learn_wait_s)
        yield _done(result, time.monotonic() - started)

    async def __aenter__(self) -> Self:
        self.reward_bus.bus = (await self._sessions.open()).bus
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._sessions.aclose()
        self.reward_bus.bus = None

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[Session]:
        """Yield the session that `async with` opened, else one for this block alone."""
        if self._sessions.owner is not None:
            yield await self._sessions.open()
            return
        async with aclosing(self._make_session(self._sessions.inheritance)) as session:
            await session.open()
            try:
                yield session
            finally:
                if self.reward_bus.bus is session.bus:
                    self.reward_bus.bus = None

    def _make_session(self, parent: Inheritance | None) -> Session:
        return Session(
            lambda: self.cluster.nodes,
            from_environment(),
            self.lifecycle.config,
            self.llm,
            skills=skill_nodes(self.skill_registry, self.llm),
            parent=parent,
            owner=Owner("AmoebaLoop", f"{THREADSAFE}, or an AmoebaLoop of its own"),
        )


class _Learned:
    """Listens for ADAPT to say that a task has been learned from, and shows it in the cluster's own node.

    The node's host hears the same news, but over another connection: perhaps later.
    """

    def __init__(self, bus: Bus, task_id: str, cluster: ClusterManager) -> None:
        self._bus = bus
        self._task_id = task_id
        self._cluster = cluster
        self._heard = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._subscription = await self._bus.subscribe(
            self._bus.subjects.of("lifecycle", "learned", "*"), self._on_news
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._bus.unsubscribe(self._subscription)

    async def wait(self, seconds: float) -> None:
        """Wait until it has been said, or for so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._heard.wait()
        except TimeoutError:
            log.info("not_learned_yet", task_id=self._task_id, waited_s=seconds)

    async def _on_news(self, msg: Msg) -> None:
        try:
            news = decode(msg.data, Lifecycle)
        except Undecodable as error:
            self._bus.discards.add("lifecycle_undecodable", reason=error.message, subject=msg.subject)
            return
        if self._task_id not in news.task_ids:
            return
        for node in self._cluster.nodes:
            if node.id == news.node_id and news.profile is not None:
                node.mirror(news.profile)
        self._heard.set()


def _done(result: TaskResult, seconds: float) -> Done:
    return Done(
        content=result.content,
        tokens_used=result.prompt_tokens + result.completion_tokens,
        steps=result.steps,
        duration_ms=seconds * 1000,
        usage=TokenUsage(
            prompt_tokens=result.prompt_tokens,
            completion_tokens=result.completion_tokens,
            total_tokens=result.prompt_tokens + result.completion_tokens,
            estimated=result.estimated_usage,
        ),
    )
