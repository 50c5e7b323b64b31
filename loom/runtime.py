"""The Python front door: a Runtime adds agents and submits tasks."""

import asyncio
import concurrent.futures
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any, TypeVar, overload

from loom.ads import AnyAd, ad_of, as_type, with_schema
from loom.agent_nodes import check_agent, derived_name, made_agent
from loom.agents.llm.config import AgentConfig
from loom.agents.tools import Tool
from loom.arguments import check_cluster_config, check_config, check_provider, check_several
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.loop_ownership import THREADSAFE, Owner
from loom.bus.task_client import TaskHandle
from loom.compat.amoeba_loop import AmoebaLoop
from loom.compat.cluster_manager import ClusterManager, InvalidNode
from loom.compat.lifecycle import LifecycleManager
from loom.compat.reward_formulas import RewardBus
from loom.compat.runtime_loop import RuntimeLoop
from loom.compat.skill_nodes import load, skill_nodes
from loom.compat.skill_registry import SkillNodeRegistry
from loom.compat.types import HealthReport
from loom.nodes import AgentNode
from loom.open_runtime import OpenRuntime
from loom.runner.node_overview import NodeOverview, node_overviews
from loom.runner.session import Inheritance, Session
from loom.runner.settings import from_environment
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import BusUnavailable, InvalidTask, LoomError
from loom.schemas.learning.judgement import judgement
from loom.schemas.llm import AnyProvider
from loom.schemas.task import TaskAd, TaskResult
from loom.self_ratings import AnyCapabilities, domains_of, profile_of
from loom.skills import Skill

T = TypeVar("T")

log = get_logger()

__path__ = [str(Path(__file__).parent / "compat" / "runtime")]
"""Makes `loom.runtime.core` importable, the path of loom-agent 0.6."""


class Runtime(OpenRuntime):
    """Hosts agents of this process, and submits tasks to all agents of the cluster.

    The constructor does no I/O; the first `await` connects. With NATS_URL it connects to that server, otherwise to an
    embedded one with the six phases in this process.

    Use `async with`, or `with` in synchronous code: on exit the running tasks finish. After an exception in the block,
    an embedded server stops at once. `dispose` closes without waiting. A closed Runtime refuses further calls with a
    LoomError until `async with` or `with` opens it again.

    A Runtime belongs to the event loop that opens it. Calls from another running loop raise `WrongEventLoop` without
    effect; synchronous code and other threads use `submit_sync`. A forked child opens its own session, to the parent's
    embedded server as long as it responds. Nodes added before the fork stay in the parent. Each run starts with the
    context variables of the code that made the Runtime.

    Args:
        provider: The model of agents that `add_agent` makes, and of SENSE, SCALE and EVALUATE in this process.
        config: Settings of those agents.
        cluster_config: Settings of the phases in this process; absent: the defaults and the environment.
        store: Folder of an embedded server, in which records and evidence outlive the program. Absent: the folder of
            LOOM_STORE, or a temporary one. One server at a time may use a folder: a second one fails with
            `BusUnavailable`, which has the address of the first.

    Raises:
        LoomError: An argument has another type.
    """

    def __init__(
        self,
        provider: AnyProvider | None = None,
        config: AgentConfig | None = None,
        cluster_config: ClusterConfig | None = None,
        store: str | os.PathLike[str] | None = None,
    ) -> None:
        check_provider(provider)
        check_config(config)
        check_cluster_config(cluster_config)
        self.provider = provider
        self.config = config or AgentConfig()
        super().__init__(self._make_session, from_environment(), RewardBus())
        self._store = Path(store) if store is not None else None
        self._cluster_config = cluster_config or self._settings.cluster
        self.cluster = ClusterManager(self._cluster_config)
        self.lifecycle = LifecycleManager(self._cluster_config)
        self.skill_registry = SkillNodeRegistry()
        """Skills that become nodes with the Runtime's provider and config when a task gets no bid."""
        self._context = copy_context()
        """Context variables of runs: those of the code that made the Runtime, not of its first user."""

    def __repr__(self) -> str:
        owner = self._sessions.owner
        state = "closed" if self._closed else "open" if owner is not None else "not open"
        server = self._settings.nats_url and Bus(self._settings.nats_url).connection.address
        where = server or (f"store {str(self._store)!r}" if self._store else "embedded")
        return f"<Runtime {state}, {where}, {len(self.cluster.nodes)} nodes>"

    # -- agents

    def add_agent(
        self,
        agent: Any = None,
        *,
        capabilities: AnyCapabilities | None = None,
        name: str | None = None,
        domains: Collection[str] | None = None,
        replace: bool = False,
        system_prompt: str | None = None,
        tools: Iterable[Tool | Callable[..., Any]] = (),
        provider: AnyProvider | None = None,
        config: AgentConfig | None = None,
    ) -> AgentNode:
        """Add a node; it bids from the next call for bids on.

        Args:
            agent: A function, or an object with `stream(job)` or `run(text)`; absent: made of provider and config.
            capabilities: Self-ratings: domain -> 0 to 1, as a dict or in a profile. With 0 the node refuses the domain.
            name: Node id, the key of its evidence; absent: derived from the parts of the agent.
            domains: Domains that the node accepts, in any wording; absent: all. Pinned tasks need none of them.
            replace: Whether the node replaces a node of that name. Running work ends with the agent that started it.
            system_prompt: For a made agent, instead of that of the config.
            tools: For a made agent: tools, functions to make tools of, or a ToolRegistry.
            provider: The model of a made agent, instead of that of the Runtime. Several models in one Runtime:
                `add_agent(provider=OpenAIProvider(config), config=config)`.
            config: For a made agent, instead of that of the Runtime. Model and server are those of the provider.

        Raises:
            LoomError: Neither an agent nor a provider is given, or an argument has the wrong type or no effect.
            InvalidNode: A rating is not a number from 0 to 1, or the name is in use or not a token.
        """
        if agent is None:
            agent = made_agent(
                provider or self.provider, config or self.config, system_prompt=system_prompt, tools=tools
            )
        else:
            check_agent(agent, system_prompt=system_prompt, tools=tools or None, provider=provider, config=config)
        profile = profile_of(capabilities, getattr(agent, "tools", ()))
        takes = domains_of(domains)
        node_id = name or derived_name(agent, profile, [node.id for node in self.cluster.nodes])
        self._free_name(node_id, replace=replace)
        node = AgentNode(id=node_id, capabilities=profile, agent=agent, domains=takes)
        self.cluster.add_node(node)
        return node

    def _free_name(self, node_id: str, *, replace: bool) -> None:
        """Remove the node of this name, or refuse the name if `replace` is false."""
        if replace:
            self.cluster.remove_node(node_id)
        elif self.cluster.get_node(node_id) is not None:
            hint = f"choose another name, pass replace=True, or call remove_agent({node_id!r}) first"
            raise InvalidNode(f"there is another node {node_id}: {hint}", node_id=node_id)

    def remove_agent(self, name: str) -> AgentNode:
        """Remove and return a node; it stops bidding, and its present runs continue to their end.

        Raises:
            InvalidNode: No node has that name.
        """
        node = self.cluster.remove_node(name)
        if node is None:
            known = ", ".join(node.id for node in self.cluster.nodes) or "none"
            raise InvalidNode(f"there is not a node {name}; there are: {known}", node_id=name)
        return node

    def load_skill(self, skill: Skill) -> AgentNode:
        """Register a skill and add a node that follows its instructions.

        The node rates itself .7 in the domain of the skill's name. `skill_registry.register` alone adds a node only
        when a task needs the skill and no node bids.

        Raises:
            LoomError: The Runtime has no provider, or the skill requires a tool that is not in the registry.
        """
        if self.provider is None:
            raise LoomError("no provider: pass one to Runtime before it loads a skill")
        node = load(skill, self.skill_registry, self.provider, self.config)
        self.cluster.add_node(node)
        return node

    def amoeba_loop(self) -> AmoebaLoop:
        """Return a loop with the nodes and skills of this Runtime, on its server while the Runtime is open.

        Raises:
            LoomError: The Runtime has no provider.
        """
        if self.provider is None:
            raise LoomError("no provider: pass one to Runtime before it makes a loop")
        return RuntimeLoop(
            self._sessions,
            self.cluster,
            self.reward_bus,
            self.lifecycle,
            self.skill_registry,
            self.provider,
            store=self._store,
        )

    def health_check(self) -> list[HealthReport]:
        """Return the health of the nodes of this Runtime, from the latest profiles that ADAPT published."""
        return self.lifecycle.check_all(self.cluster.nodes)

    async def nodes(self) -> list[NodeOverview]:
        """Return every node of the cluster with its evidence in each domain; takes about a second.

        Raises:
            BusUnavailable: No server or no phases respond.
        """
        session = await self._open()
        return await node_overviews(session.bus, self._cluster_config)

    # -- tasks

    @overload
    async def submit(self, task: AnyAd, *, cancel_with_caller: bool = False) -> str: ...

    @overload
    async def submit(self, task: AnyAd, *, returns: type[T], cancel_with_caller: bool = False) -> T: ...

    @overload
    async def submit(self, task: AnyAd, *, returns: Any, cancel_with_caller: bool = False) -> Any: ...

    async def submit(self, task: AnyAd, *, returns: Any = str, cancel_with_caller: bool = False) -> Any:
        """Return the answer to a task. Code without an event loop calls `submit_sync`.

        Warnings in the result, for example about a misspelt domain, are logged.

        Args:
            task: The work: an ad, a dict of an ad's fields, or a text.
            returns: Type of the answer: a dataclass, a pydantic model, a TypedDict, `list[int]`, …. Its JSON Schema
                becomes the ad's `accept.json_schema`, unless the ad has one, and the answer is decoded as that type.
            cancel_with_caller: Whether the task is cancelled when this call is, as by `asyncio.timeout`. Otherwise
                the task continues, and its answer is dropped.

        Raises:
            LoomError: The task failed; see the class and its code.
            RejectedResult: No answer met the rules of `accept`, or the answer is not of the type. `best_rejected` is
                the best refused answer.
            WrongEventLoop: The Runtime is open in another event loop.

        Example:
            >>> await rt.submit("Which year was NATS first released?", returns=int)
            2010
        """
        ad = with_schema(ad_of(task), returns)
        session = await self._open(ad)
        async with task_client.published(
            session.bus, ad, deltas=False, cancel_with_caller=cancel_with_caller
        ) as handle:
            task_client.log_warnings(await handle.result())
            return as_type(await handle.content(), returns, ad.task_id)

    @overload
    def submit_sync(self, task: AnyAd, timeout_s: float | None = None) -> str: ...

    @overload
    def submit_sync(self, task: AnyAd, timeout_s: float | None = None, *, returns: type[T]) -> T: ...

    @overload
    def submit_sync(self, task: AnyAd, timeout_s: float | None = None, *, returns: Any) -> Any: ...

    def submit_sync(self, task: AnyAd, timeout_s: float | None = None, *, returns: Any = str) -> Any:
        """Return the answer to a task, for code without an event loop: a script, a web view, a sync agent.

        It uses the event loop of another thread in which the Runtime is open. Otherwise it starts a background thread,
        which `dispose` ends.

        Args:
            task: The work, as for `submit`.
            timeout_s: Seconds to wait for the answer; the task itself continues. None: until the task ends.
            returns: The type of the answer, as for `submit`.

        Raises:
            LoomError: The task failed, the Runtime is closed, or this thread runs an event loop: use `await submit(…)`
                there.
            RejectedResult: The answer is not of the type.
            TimeoutError: No answer came within `timeout_s`.
            WrongEventLoop: The Runtime is open in an event loop that is not running.
            BusUnavailable: The Runtime was closed before the task ended.
        """
        ad = ad_of(task)
        self._check_closed()
        loop = self._loop_for_sync()
        answer = asyncio.run_coroutine_threadsafe(self.submit(ad, returns=returns), loop)
        try:
            return answer.result(timeout_s)
        except concurrent.futures.CancelledError:
            raise BusUnavailable("the Runtime was closed before the task ended", task_id=ad.task_id) from None
        finally:
            answer.cancel()  # after a timeout or an interrupt; no effect on a finished call

    async def publish(self, task: AnyAd) -> TaskHandle:
        """Publish a task and return its handle at once, with `result`, `events`, `status` and `cancel`.

        Args:
            task: The work, as for `submit`.

        Raises:
            InvalidTask: The ad breaks a rule.
            Overloaded: The intake is full.
            BusUnavailable: No server or no phases respond.
        """
        ad = ad_of(task)
        session = await self._open(ad)
        return await task_client.publish(session.bus, ad)

    async def submit_many(
        self, ads: Sequence[AnyAd], *, at_once: int = 64, cancel_with_caller: bool = False
    ) -> list[TaskResult]:
        """Return the results of all tasks in their order; a failed one has an `error`.

        Args:
            ads: The tasks, each as for `submit`.
            at_once: Most tasks in the cluster at a time.
            cancel_with_caller: Whether running tasks are cancelled when this call is.

        Raises:
            InvalidTask: `ads` is a single task, or an ad breaks a rule.
        """
        check_several(ads)
        slots = asyncio.Semaphore(at_once)

        async def result_of(ad: TaskAd) -> TaskResult:
            async with slots:
                session = await self._open(ad)
                async with task_client.published(
                    session.bus, ad, deltas=False, cancel_with_caller=cancel_with_caller
                ) as handle:
                    return await handle.result()

        calls = [asyncio.ensure_future(result_of(ad_of(ad))) for ad in ads]
        try:
            return list(await asyncio.gather(*calls))
        finally:  # no call continues after an error
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    async def feedback(self, task_id: str, score: float, *, reason: str = "") -> None:
        """Publish a person's score of an ended task as a reward. Its source is the name in LOOM_SOURCE.

        Args:
            task_id: A task with at least one attempt.
            score: 0 useless to 1 perfect.
            reason: A sentence for people.

        Raises:
            UnknownTask: No task has that id.
            InvalidTask: No node has worked on the task, or the score is out of range.
        """
        if not isinstance(task_id, str):
            raise InvalidTask(f"task_id must be a text, not a {type(task_id).__name__}", field="task_id")
        session = await self._open()
        record = await task_client.record(session.bus, task_id)
        if record is None:
            raise InvalidTask("only a task that a node has finished can be judged", task_id=task_id)
        await self.reward_bus.publish(judgement(record, score, reason, session.bus.identity.source))

    def _make_session(self, parent: Inheritance | None) -> Session:
        return Session(
            lambda: self.cluster.nodes,
            self._settings,
            self._cluster_config,
            self.provider,
            skills=skill_nodes(self.skill_registry, self.provider, self.config),
            context=self._context,
            parent=parent,
            store=self._store,
            owner=Owner("Runtime", f"submit_sync, or {THREADSAFE}, or a Runtime of its own"),
        )
