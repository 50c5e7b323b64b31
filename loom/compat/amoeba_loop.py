"""AmoebaLoop of loom-agent 0.6: runs a conversation through the six phases and yields its events."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from loom.bus import task_client
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.loop_ownership import THREADSAFE, Owner
from loom.bus.natsio.transport.message import Msg
from loom.bus.task_client import TaskHandle
from loom.compat.cluster_manager import ClusterManager
from loom.compat.lifecycle import LifecycleManager
from loom.compat.loop_context import LoopContext
from loom.compat.phase_events import REWARDED, PhaseReports, adapted
from loom.compat.planner import TaskPlanner
from loom.compat.reward_formulas import RewardBus
from loom.compat.skill_nodes import skill_nodes
from loom.compat.skill_registry import SkillNodeRegistry
from loom.compat.subtask_events import Subtasks
from loom.runner.server.temporary_store import TemporaryStore
from loom.runner.session import Inheritance, Session
from loom.runner.session_owner import SessionOwner
from loom.runner.settings import Settings, from_environment
from loom.schemas.base import Undecodable, decode
from loom.schemas.events import Done, ErrorEvent, LoopEvent, SubtaskEvent, TextDelta, TokenUsage
from loom.schemas.identity import ADAPT, LOCAL_OWNER
from loom.schemas.learning.lifecycle import Lifecycle
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.llm import AnyProvider
from loom.schemas.task import TaskResult

log = get_logger()


class AmoebaLoop:
    """Runs a conversation's task through SENSE, MATCH, SCALE, EXECUTE, EVALUATE and ADAPT.

    `execute` opens a session and closes it again; inside `async with loop` the session stays open between calls.
    Evidence is kept between calls, and the nodes of `cluster` show it.

    Args:
        cluster: Its nodes are hosted while the loop is open; later changes count.
        reward_bus: Its `bus` is set while the loop is open.
        lifecycle: Its config has the settings of the phases that the loop starts.
        planner: For the caller's own use: SCALE plans without it.
        skill_registry: A skill that a task needs becomes a node if there are no bids. With skills in the registry, the
            loop hosts up to `max_nodes` nodes: those of skills, and clones of overloaded nodes.
        llm: The model of skills, and of SENSE, SCALE and EVALUATE in this process.
        store: Folder of an embedded server with records and evidence. Absent: the folder of LOOM_STORE, or a temporary
            one that ends with the loop (`dispose`, garbage collection, or the end of the program).
    """

    def __init__(
        self,
        cluster: ClusterManager,
        reward_bus: RewardBus,
        lifecycle: LifecycleManager,
        planner: TaskPlanner,
        skill_registry: SkillNodeRegistry,
        llm: AnyProvider | None = None,
        *,
        store: str | os.PathLike[str] | None = None,
    ) -> None:
        self.cluster = cluster
        self.reward_bus = reward_bus
        self.lifecycle = lifecycle
        self.planner = planner
        self.skill_registry = skill_registry
        self.llm = llm
        self._store = Path(store) if store is not None else None
        self._temporary: TemporaryStore | None = None
        self._sessions = SessionOwner(self._make_session)
        self._held: Session | None = None
        """The session that `async with` keeps open."""

    async def execute(self, ctx: LoopContext) -> AsyncIterator[LoopEvent]:
        """Yield events until the task has ended and ADAPT has processed its reward; the last event is Done.

        A failed attempt yields a recoverable ErrorEvent before the next attempt, a failed task a final ErrorEvent
        before Done. A SubtaskEvent reports that a subtask starts or ends. A PhaseEvent reports the decision of a
        phase: the first three with the attempt's first progress, all before Done.

        Ending the iteration early cancels the task.

        Raises:
            InvalidTask: The context has no task.
            BusUnavailable: No server or no phases answer.
            WrongEventLoop: The loop is open in another event loop, by `async with` or by a conversation there.
        """
        ad = ctx.to_ad()
        async with self._session() as session:
            self.reward_bus.bus = session.bus
            await session.announce(ad.node_id)
            async with (
                _Learned(session, ad.task_id, self.cluster) as learned,
                Subtasks(session.bus, ad.task_id) as parts,
                task_client.published(session.bus, ad, deltas=True, cancel_with_caller=True) as handle,
                aclosing(self._follow(handle, parts, learned)) as events,
            ):
                async for event in events:
                    yield event

    async def _follow(
        self, handle: TaskHandle, parts: Subtasks, learned: "_Learned"
    ) -> AsyncGenerator[LoopEvent, None]:
        started = time.monotonic()
        text, attempt = "", 1
        phases = PhaseReports(handle)
        async with aclosing(parts.follow(handle)) as deltas:
            async for delta in deltas:
                if isinstance(delta, SubtaskEvent):
                    phases.subtasks.add(delta.subtask)
                    yield delta
                    continue
                if delta.attempt > attempt:
                    text, attempt = "", delta.attempt
                    yield ErrorEvent(error="the attempt failed; another node takes over", recoverable=True)
                for report in await phases.of_attempt(delta.attempt):
                    yield report
                if isinstance(delta.event, TextDelta):
                    text += delta.event.text
                yield delta.event
        result = await handle.result()
        async with aclosing(self._ending(result, text, phases, learned)) as events:
            async for event in events:
                yield event
        yield _done(result, time.monotonic() - started)

    async def _ending(
        self, result: TaskResult, text: str, phases: PhaseReports, learned: "_Learned"
    ) -> AsyncGenerator[LoopEvent, None]:
        """Yield the remaining events of an ended task; `text` is the part of its answer that was yielded."""
        task_client.log_warnings(result)
        if result.content != text and result.content.startswith(text):
            yield TextDelta(text=result.content[len(text) :])  # deltas may get lost, the result does not
        for report in await phases.of_ended():
            yield report
        if result.error is not None:
            yield ErrorEvent(error=result.error.message, code=result.error.code)
        if learned.concerns(result) and (result.error is None or result.error.code in REWARDED):
            profile = await learned.wait(result.node_id or "", self.lifecycle.config.learn_wait_s)
            if profile is not None:
                yield adapted(profile, result.attempts)

    async def __aenter__(self) -> Self:
        self._held = await self._sessions.open()
        self.reward_bus.bus = self._held.bus
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    def dispose(self) -> None:
        """Close everything at once and remove the temporary store; from any thread, safe to call twice."""
        self._held = None
        self._sessions.abort()
        temporary, self._temporary = self._temporary, None
        if temporary is not None:
            temporary.remove()

    async def _close(self) -> None:
        await self._sessions.aclose()
        self._held = None
        self.reward_bus.bus = None

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[Session]:
        """Yield the session of `async with`, or one that its last user closes, because users share a store."""
        session = await self._sessions.open()
        session.users += 1
        try:
            yield session
        finally:
            session.users -= 1
            if not session.users and session.is_open and session is not self._held:
                await self._close()

    def _make_session(self, parent: Inheritance | None) -> Session:
        settings = from_environment()
        return Session(
            lambda: self.cluster.nodes,
            settings,
            self.lifecycle.config,
            self.llm,
            skills=skill_nodes(self.skill_registry, self.llm),
            parent=parent,
            store=self._store_for(settings),
            owner=Owner("AmoebaLoop", f"{THREADSAFE}, or an AmoebaLoop of its own"),
        )

    def _store_for(self, settings: Settings) -> Path | None:
        """Return the folder of the loop's store; None if the settings have one."""
        if self._store is not None or settings.nats_url or settings.loom_store:
            return self._store
        if self._temporary is None or self._temporary.is_inherited:
            self._temporary = TemporaryStore()
        return self._temporary.folder


class _Learned:
    """Subscribes to ADAPT's `learned` events of a task and copies the profile to the node of the cluster.

    The node's host gets the same message over another connection, perhaps later. A session without nodes of its own
    does not listen, as the permissions of a submitter need not allow it.
    """

    def __init__(self, session: Session, task_id: str, cluster: ClusterManager) -> None:
        self._bus = session.bus
        self._listens = session.hosts_nodes
        self._task_id = task_id
        self._cluster = cluster
        self._heard = asyncio.Event()
        self._profiles: dict[str, NodeProfile] = {}

    async def __aenter__(self) -> Self:
        if self._listens:
            subject = self._bus.subjects.of("lifecycle", ADAPT, "learned", self._bus.identity.owner, "*")
            self._subscription = await self._bus.connection.subscribe(subject, self._on_news)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listens:
            self._bus.connection.unsubscribe(self._subscription)

    def concerns(self, result: TaskResult) -> bool:
        """Return whether a node of this process's owner ran the task, and this process hosts nodes."""
        owned = (result.owner or LOCAL_OWNER) == self._bus.identity.owner
        return self._listens and result.node_id is not None and owned

    async def wait(self, node_id: str, seconds: float) -> NodeProfile | None:
        """Wait for the node's profile after the task, at most so long, and return it."""
        try:
            async with asyncio.timeout(seconds):
                while node_id not in self._profiles:
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            log.info("not_learned_yet", task_id=self._task_id, waited_s=seconds)
        return self._profiles.get(node_id)

    async def _on_news(self, msg: Msg) -> None:
        try:
            news = decode(msg.data, Lifecycle)
        except Undecodable as error:
            self._bus.discards.add("lifecycle_undecodable", reason=error.message, subject=msg.subject)
            return
        if self._task_id not in news.task_ids:
            return
        if news.profile is None:
            return
        for node in self._cluster.nodes:
            if node.id == news.node_id:
                node.mirror(news.profile)
        self._profiles[news.node_id] = news.profile
        self._heard.set()


def _done(result: TaskResult, seconds: float) -> Done:
    return Done(
        content=result.content,
        tokens_used=result.prompt_tokens + result.completion_tokens,
        steps=result.steps,
        duration_ms=round(seconds * 1000),
        usage=TokenUsage(
            prompt_tokens=result.prompt_tokens,
            completion_tokens=result.completion_tokens,
            total_tokens=result.prompt_tokens + result.completion_tokens,
            estimated=result.estimated_usage,
        ),
    )
