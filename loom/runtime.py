"""The Python front door: a cluster of agents, and tasks handed to it."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Sequence
from contextvars import copy_context
from copy import deepcopy
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from loom.agents.function_agent import as_agent
from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig
from loom.agents.tools import Tool
from loom.background_loop import BackgroundLoop
from loom.bus import tasks
from loom.bus.log import get_logger
from loom.bus.ownership import THREADSAFE, Owner, running_loop
from loom.bus.reward_bus import RewardBus, judgement
from loom.bus.tasks import TaskHandle
from loom.cluster.amoeba_loop import AmoebaLoop
from loom.cluster.lifecycle import LifecycleManager
from loom.cluster.manager import ClusterManager, InvalidNode
from loom.cluster.runtime_loop import RuntimeLoop
from loom.cluster.skill_nodes import node_of, skill_nodes, tools_of
from loom.cluster.skill_registry import SkillNodeRegistry
from loom.runner.node_overview import NodeOverview, node_overviews
from loom.runner.session import Inheritance, Session
from loom.runner.session_owner import SessionOwner
from loom.runner.settings import Settings, from_environment
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import TaskRecord
from loom.schemas.errors import BusUnavailable, InvalidTask, LoomError
from loom.schemas.llm import LLMProvider
from loom.schemas.task import TaskAd, TaskResult
from loom.types import AgentNode, CapabilityProfile, HealthReport, Skill

log = get_logger()

__path__ = [str(Path(__file__).parent / "compat" / "runtime")]
"""Makes `loom.runtime.core` importable, the path of loom-agent 0.6."""

SKILL_CLAIM = 0.7
"""What the node of a loaded skill claims in the domain of its name."""


class Runtime:
    """Agents of this process, and a way to hand tasks to all agents on the bus.

    Building one does nothing; the first `await` connects: to the server of NATS_URL when that is set, else to an
    embedded one with the six phases in this process. End it with `dispose`, or better `async with`: that finishes what
    is in hand, unless an exception leaves it and no other client is on the server. Each run starts from the context
    variables there are where the Runtime is made.

    One event loop at a time uses it: the one that opens it. Calls from another living loop raise `WrongEventLoop` and
    change nothing; synchronous code and other threads use `submit_sync`. A forked child opens a session of its own:
    to the parent's embedded server while that answers. Nodes added before the fork stay with the parent.

    Args:
        provider: The model that agents made by `add_agent` use, and SENSE where it runs here.
        config: Settings of those agents.
        cluster_config: Rules the phases started here; absent: the seed's numbers and the environment's.
    """

    def __init__(
        self,
        provider: LLMProvider | None = None,
        config: AgentConfig | None = None,
        cluster_config: ClusterConfig | None = None,
    ) -> None:
        self.provider = provider
        self.config = config or AgentConfig()
        self.reward_bus = RewardBus()
        self._settings: Settings = from_environment()
        self._cluster_config = cluster_config or self._settings.cluster
        self.cluster = ClusterManager(self._cluster_config)
        self.lifecycle = LifecycleManager(self._cluster_config)
        self.skill_registry = SkillNodeRegistry()
        """As of `AmoebaLoop`: skills to become nodes where nobody bids; they work with the provider and the config."""
        self._context = copy_context()
        """Of context variables runs see what the maker of the Runtime saw, not what its first user does."""
        self._sessions = SessionOwner(self._make_session)
        self._background = BackgroundLoop(at_exit=self.dispose)

    # -- agents

    def add_agent(
        self,
        agent: Any = None,
        *,
        capabilities: CapabilityProfile | None = None,
        name: str | None = None,
        system_prompt: str | None = None,
        tools: Sequence[Tool | Callable[..., Any]] = (),
    ) -> AgentNode:
        """Add a node; it bids from the next call on.

        Args:
            agent: An agent, or a Python function that does the work; absent: one is made of the Runtime's
                provider and config.
            capabilities: What it claims: domain -> 0 to 1.
            name: Its node id, under which evidence about it is kept; absent: derived from what it is made of.
            system_prompt: For a made agent, instead of the config's.
            tools: For a made agent.

        Raises:
            LoomError: There is neither an agent nor a provider, what is given is no agent, or the name is taken or
                not a token.
        """
        if agent is None:
            if self.provider is None:
                raise LoomError("no provider: pass one to Runtime, or an agent or function to add_agent")
            agent = Agent(self.provider, self.config, system_prompt=system_prompt, tools=tools)
        as_agent(agent)  # what is none is refused here, and not by every run
        capabilities = deepcopy(capabilities) if capabilities else CapabilityProfile()  # two nodes may claim alike
        capabilities.tools = list(dict.fromkeys([*capabilities.tools, *getattr(agent, "tools", ())]))
        if name is not None and self.cluster.get_node(name) is not None:
            raise InvalidNode(f"there is another node {name}: remove it first or choose a name", node_id=name)
        node = AgentNode(id=name or self._name(agent, capabilities), capabilities=capabilities, agent=agent)
        self.cluster.add_node(node)
        return node

    def _name(self, agent: Any, capabilities: CapabilityProfile) -> str:
        """Who a node is, by what it is made of: the same again after a restart."""
        made_of = [
            getattr(agent, "system_prompt", "") or getattr(agent, "__qualname__", type(agent).__name__),
            sorted(capabilities.tools),
            sorted(capabilities.scores.items()),
        ]
        digest = blake2b(msgspec.json.encode(made_of), digest_size=4).hexdigest()
        ordinal = sum(node.id.startswith(digest) for node in self.cluster.nodes)
        return f"{digest}-{ordinal + 1}"

    def load_skill(self, skill: Skill) -> AgentNode:
        """Add the skill, and a node that follows its instructions, at once; return the node.

        It claims .7 in the domain of the skill's name. `skill_registry.register` alone adds a node only when a task
        calls for the skill and no node bids.

        Raises:
            LoomError: There is no provider, or the skill names a tool that the registry was not given.
        """
        if self.provider is None:
            raise LoomError("no provider: pass one to Runtime before it loads a skill")
        tools = tools_of(self.skill_registry)
        missing = sorted(set(skill.tools) - tools.keys())
        if missing:
            names = ", ".join(missing)
            raise LoomError(f"skill {skill.name} names tools that the skill_registry was not given: {names}")
        node = node_of(skill, tools, self.provider, self.config)
        node.capabilities = CapabilityProfile(scores={skill.name: SKILL_CLAIM}, tools=list(skill.tools))
        self.cluster.add_node(node)
        self.skill_registry.register(skill)
        self.skill_registry.mark_loaded(skill.name)
        return node

    def amoeba_loop(self) -> AmoebaLoop:
        """Return a loop over the nodes and skills added here; while the Runtime is open, on its server.

        Raises:
            LoomError: There is no provider.
        """
        if self.provider is None:
            raise LoomError("no provider: pass one to Runtime before it makes a loop")
        return RuntimeLoop(
            self._sessions, self.cluster, self.reward_bus, self.lifecycle, self.skill_registry, self.provider
        )

    def health_check(self) -> list[HealthReport]:
        """Return how the nodes added here fare, by what ADAPT last said of them."""
        return self.lifecycle.check_all(self.cluster.nodes)

    async def nodes(self) -> list[NodeOverview]:
        """Return every node of the cluster and what is known of it in each domain; takes about half a second.

        Raises:
            BusUnavailable: No server or no phases answer.
        """
        session = await self._open()
        return await node_overviews(session.bus, self._cluster_config)

    # -- tasks

    async def submit(self, task: TaskAd, *, cancel_with_caller: bool = False) -> str:
        """Return the answer to a task.

        Args:
            task: The work.
            cancel_with_caller: Whether the task is cancelled when this call is, as by `asyncio.timeout`; otherwise
                the task goes on, and only its answer is dropped.

        Raises:
            LoomError: The task failed; the class and its code say how.
            WrongEventLoop: The Runtime is open in another event loop.
        """
        session = await self._open()
        async with tasks.published(session.bus, task, deltas=False, cancel_with_caller=cancel_with_caller) as handle:
            return await handle.content()

    def submit_sync(self, task: TaskAd, timeout_s: float | None = None) -> str:
        """Return the answer to a task, from code without an event loop: a script, a web view, a sync agent.

        While the Runtime is open in an event loop of another thread, the task goes through that loop; otherwise
        through a background thread that `dispose` ends.

        Args:
            task: The work.
            timeout_s: Seconds to wait for the answer; the task itself goes on. None: until the task ends.

        Raises:
            LoomError: The task failed, or this thread runs an event loop: use `await submit(…)` there.
            TimeoutError: There is no answer in `timeout_s`.
            WrongEventLoop: The Runtime is open in an event loop that does not run now.
            BusUnavailable: The Runtime was closed meanwhile.
        """
        loop = self._loop_for_sync()
        answer = asyncio.run_coroutine_threadsafe(self.submit(task), loop)
        try:
            return answer.result(timeout_s)
        except concurrent.futures.CancelledError:
            raise BusUnavailable("the Runtime was closed before the task ended", task_id=task.task_id) from None
        finally:
            answer.cancel()  # after a timeout or an interrupt; without effect on an answer that is here

    async def publish(self, task: TaskAd) -> TaskHandle:
        """Hand a task to the loop and return at once: the handle gives `result`, `events`, `status`, `cancel`.

        Raises:
            InvalidTask: The ad breaks a rule.
            Overloaded: The intake is full.
            BusUnavailable: No server or no phases answer.
        """
        session = await self._open()
        return await tasks.publish(session.bus, task)

    async def submit_many(
        self, ads: Sequence[TaskAd], *, at_once: int = 64, cancel_with_caller: bool = False
    ) -> list[TaskResult]:
        """Return the results of all tasks in their order; one that failed says so in its `error`.

        Args:
            ads: Any number.
            at_once: Most tasks in the loop at a time.
            cancel_with_caller: Whether tasks in the loop are cancelled when this call is.
        """
        room = asyncio.Semaphore(at_once)

        async def one(ad: TaskAd) -> TaskResult:
            async with room:
                session = await self._open()
                async with tasks.published(
                    session.bus, ad, deltas=False, cancel_with_caller=cancel_with_caller
                ) as handle:
                    return await handle.result()

        waiting = [asyncio.ensure_future(one(ad)) for ad in ads]
        try:
            return list(await asyncio.gather(*waiting))
        finally:  # after an error, too, none of them goes on
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def feedback(self, task_id: str, score: float, *, reason: str = "") -> None:
        """Publish a person's judgement of an ended task to the RewardBus.

        Args:
            task_id: A task that a node has worked on.
            score: 0 useless to 1 perfect.
            reason: For people.

        Raises:
            UnknownTask: No such task.
            InvalidTask: No node has worked on it, or the score is out of range.
        """
        session = await self._open()
        record = await tasks.status(session.bus, task_id)
        if not isinstance(record, TaskRecord):
            raise InvalidTask("only a task that a node has finished can be judged", task_id=task_id)
        await self.reward_bus.publish(judgement(record, score, reason))

    # -- lifecycle

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self._settings.nats_url:
            self.dispose()  # the server goes, too: nobody is left to hear of what is in hand
        await self.aclose()

    async def aclose(self) -> None:
        """Drain what is in hand and close everything; safe to call twice.

        Raises:
            WrongEventLoop: The Runtime is open in another event loop.
        """
        await self._sessions.aclose()

    def dispose(self) -> None:
        """Drop everything at once, without waiting for work in hand; from any thread, and safe to call twice."""
        self._sessions.abort()
        self._background.close()

    async def _open(self) -> Session:
        session = await self._sessions.open()
        self.reward_bus.bus = session.bus
        return session

    def _make_session(self, parent: Inheritance | None) -> Session:
        return Session(
            lambda: self.cluster.nodes,
            self._settings,
            self._cluster_config,
            self.provider,
            skills=skill_nodes(self.skill_registry, self.provider, self.config),
            context=self._context,
            parent=parent,
            owner=Owner("Runtime", f"submit_sync, or {THREADSAFE}, or a Runtime of its own"),
        )

    def _loop_for_sync(self) -> asyncio.AbstractEventLoop:
        if running_loop() is not None:
            raise LoomError("submit_sync would block the event loop of this thread; use `await rt.submit(…)`")
        owner = self._sessions.owner
        if owner is None:
            return self._background.loop()
        if not owner.loop.is_running():
            raise owner.refusal()
        return owner.loop
