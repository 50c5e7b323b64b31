"""The Python front door: a cluster of agents, and tasks handed to it."""

import asyncio
import concurrent.futures
import os
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from contextvars import copy_context
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import msgspec

from loom.ads import AnyAd, ad_of, as_type, with_schema
from loom.agents.function_agent import as_agent
from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig, settings_without_effect
from loom.agents.tools import Tool
from loom.arguments import check_cluster_config, check_config, check_provider, check_several
from loom.background_loop import BackgroundLoop
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.ownership import THREADSAFE, Owner, running_loop
from loom.bus.task_client import TaskHandle
from loom.compat.amoeba_loop import AmoebaLoop
from loom.compat.cluster_manager import ClusterManager, InvalidNode
from loom.compat.lifecycle import LifecycleManager
from loom.compat.reward_formulas import RewardBus
from loom.compat.runtime_loop import RuntimeLoop
from loom.compat.skill_nodes import load, skill_nodes
from loom.compat.skill_registry import SkillNodeRegistry
from loom.runner.node_overview import NodeOverview, node_overviews
from loom.runner.session import Inheritance, Session
from loom.runner.session_owner import SessionOwner
from loom.runner.settings import Settings, from_environment
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import BusUnavailable, InvalidTask, LoomError
from loom.schemas.learning import judgement
from loom.schemas.llm import AnyProvider
from loom.schemas.task import TaskAd, TaskResult
from loom.self_ratings import AnyCapabilities, domains_of, profile_of
from loom.types import AgentNode, CapabilityProfile, HealthReport, Skill

T = TypeVar("T")

log = get_logger()

__path__ = [str(Path(__file__).parent / "compat" / "runtime")]
"""Makes `loom.runtime.core` importable, the path of loom-agent 0.6."""


class Runtime:
    """Agents of this process, and a way to hand tasks to all agents on the bus.

    Building one does nothing; the first `await` connects: to the server of NATS_URL when that is set, else to an
    embedded one with the six phases in this process. End it with `dispose`, or better `async with`: that finishes what
    is in hand, unless an exception leaves it and no other client is on the server. In synchronous code `with` does the
    same, beside `submit_sync`. A closed Runtime refuses every further call with a LoomError until `async with` or
    `with` opens it again. Each run starts from the context variables there are where the Runtime is made.

    One event loop at a time uses it: the one that opens it. Calls from another living loop raise `WrongEventLoop` and
    change nothing; synchronous code and other threads use `submit_sync`. A forked child opens a session of its own:
    to the parent's embedded server while that answers. Nodes added before the fork stay with the parent.

    Args:
        provider: The model that agents made by `add_agent` use, and SENSE where it runs here.
        config: Settings of those agents.
        cluster_config: Rules the phases started here; absent: the seed's numbers and the environment's.
        store: Folder in which an embedded server keeps records and what has been learned, from one run of the program
            to the next; absent: that of LOOM_STORE, else a temporary one that ends with the Runtime. One server at a
            time may have it: a second one is refused with `BusUnavailable`, which names the address of the first.

    Raises:
        LoomError: One of these is something else.
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
        self.reward_bus = RewardBus()
        self._settings: Settings = from_environment()
        self._store = Path(store) if store is not None else None
        self._closed = False
        """Whether it was closed on purpose, so that only a `with` opens it again."""
        self._cluster_config = cluster_config or self._settings.cluster
        self.cluster = ClusterManager(self._cluster_config)
        self.lifecycle = LifecycleManager(self._cluster_config)
        self.skill_registry = SkillNodeRegistry()
        """As of `AmoebaLoop`: skills to become nodes where nobody bids; they work with the provider and the config."""
        self._context = copy_context()
        """Of context variables runs see what the maker of the Runtime saw, not what its first user does."""
        self._sessions = SessionOwner(self._make_session)
        self._background = BackgroundLoop(at_exit=self.dispose)

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
        """Add a node; it bids from the next call on.

        Args:
            agent: A Python function that does the work, an object with `stream(job)`, or one with `run(text)`;
                absent: an agent is made of the Runtime's provider and config.
            capabilities: What it claims: domain -> 0 to 1, as a dict or in a profile. At 0 it does not take the domain.
            name: Its node id, under which evidence about it is kept; absent: derived from what it is made of.
            domains: Domains it takes at all, in any wording; absent: every one. A pinned task needs none of them.
            replace: Whether it takes the place of a node of that name; runs in hand end with the agent they have.
            system_prompt: For a made agent, instead of the config's.
            tools: For a made agent: tools, functions to make tools of, or a ToolRegistry.
            provider: The model of a made agent, instead of the Runtime's; so nodes of one Runtime use several models:
                `add_agent(provider=OpenAIProvider(config), config=config)`.
            config: For a made agent, instead of the Runtime's. Its model and server are those of the provider.

        Raises:
            LoomError: There is neither an agent nor a provider, what is given is not an agent, an argument has no
                effect on it, a rating is not a number from 0 to 1, or the name is taken or not a token.
        """
        check_provider(provider)
        check_config(config)
        if agent is None:
            provider, config = provider or self.provider, config or self.config
            if provider is None:
                raise LoomError("no provider: pass one to Runtime or add_agent, or an agent or function to add_agent")
            unused = settings_without_effect(config, provider)
            if unused:
                log.warning("settings_without_effect", settings=unused, advice="pass provider=OpenAIProvider(config)")
            agent = Agent(provider, config, system_prompt=system_prompt, tools=tools)
        else:
            made_of = {"system_prompt": system_prompt, "tools": tools or None, "provider": provider, "config": config}
            given = [name for name, value in made_of.items() if value is not None]
            if given:
                raise LoomError(
                    f"leave out the agent or {', '.join(given)}: only an agent that add_agent makes has that"
                )
        if isinstance(agent, AgentNode):
            raise LoomError("an AgentNode is a node already: add it by rt.cluster.add_node(node)")
        as_agent(agent)  # what is none is refused here, and not by every run
        profile = profile_of(capabilities, getattr(agent, "tools", ()))
        takes = domains_of(domains)
        node_id = name or self._name(agent, profile)
        if replace:
            self.cluster.remove_node(node_id)
        elif self.cluster.get_node(node_id) is not None:
            hint = f"choose another name, pass replace=True, or call remove_agent({node_id!r}) first"
            raise InvalidNode(f"there is another node {node_id}: {hint}", node_id=node_id)
        node = AgentNode(id=node_id, capabilities=profile, agent=agent, domains=takes)
        self.cluster.add_node(node)
        return node

    def remove_agent(self, name: str) -> AgentNode:
        """Remove and return a node; it bids no more, and its runs in hand go on to their end.

        Raises:
            InvalidNode: There is not a node of that name.
        """
        node = self.cluster.remove_node(name)
        if node is None:
            known = ", ".join(each.id for each in self.cluster.nodes) or "none"
            raise InvalidNode(f"there is not a node {name}; there are: {known}", node_id=name)
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
        node = load(skill, self.skill_registry, self.provider, self.config)
        self.cluster.add_node(node)
        return node

    def amoeba_loop(self) -> AmoebaLoop:
        """Return a loop over the nodes and skills added here; while the Runtime is open, on its server.

        Raises:
            LoomError: There is no provider.
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

    @overload
    async def submit(self, task: AnyAd, *, cancel_with_caller: bool = False) -> str: ...

    @overload
    async def submit(self, task: AnyAd, *, returns: type[T], cancel_with_caller: bool = False) -> T: ...

    @overload
    async def submit(self, task: AnyAd, *, returns: Any, cancel_with_caller: bool = False) -> Any: ...

    async def submit(self, task: AnyAd, *, returns: Any = str, cancel_with_caller: bool = False) -> Any:
        """Return the answer to a task: `await rt.submit(…)`; code without an event loop calls `submit_sync`.

        Warnings in the result, such as one about a misspelt domain, are logged.

        Args:
            task: The work: an ad, a dict of an ad's fields, or a text.
            returns: The type of the answer: a dataclass, a pydantic model, a TypedDict, `list[int]`, …. Its JSON Schema
                becomes the ad's `accept.json_schema`, unless the ad has one, and the answer is read as JSON of it.
            cancel_with_caller: Whether the task is cancelled when this call is, as by `asyncio.timeout`; otherwise
                the task goes on, and only its answer is dropped.

        Raises:
            LoomError: The task failed; the class and its code say how.
            RejectedResult: No answer met what the task accepts, `best_rejected` being the best there was; or the
                answer is not of the type.
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
        """Return the answer to a task, from code without an event loop: a script, a web view, a sync agent.

        While the Runtime is open in an event loop of another thread, the task goes through that loop; otherwise
        through a background thread that `dispose` ends.

        Args:
            task: The work, as for `submit`.
            timeout_s: Seconds to wait for the answer; the task itself goes on. None: until the task ends.
            returns: The type of the answer, as for `submit`.

        Raises:
            LoomError: The task failed, the Runtime is closed, or this thread runs an event loop: use `await submit(…)`
                there.
            RejectedResult: The answer is not of the type.
            TimeoutError: There is no answer in `timeout_s`.
            WrongEventLoop: The Runtime is open in an event loop that does not run now.
            BusUnavailable: The Runtime was closed meanwhile.
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
            answer.cancel()  # after a timeout or an interrupt; without effect on an answer that is here

    async def publish(self, task: AnyAd) -> TaskHandle:
        """Publish a task and return at once: the handle gives `result`, `events`, `status`, `cancel`.

        Args:
            task: The work, as for `submit`.

        Raises:
            InvalidTask: The ad breaks a rule.
            Overloaded: The intake is full.
            BusUnavailable: No server or no phases answer.
        """
        ad = ad_of(task)
        session = await self._open(ad)
        return await task_client.publish(session.bus, ad)

    async def submit_many(
        self, ads: Sequence[AnyAd], *, at_once: int = 64, cancel_with_caller: bool = False
    ) -> list[TaskResult]:
        """Return the results of all tasks in their order; one that failed says so in its `error`.

        Args:
            ads: Any number, each as for `submit`.
            at_once: Most tasks in the loop at a time.
            cancel_with_caller: Whether tasks in the loop are cancelled when this call is.

        Raises:
            InvalidTask: It is a single task, or one of them breaks a rule.
        """
        check_several(ads)
        room = asyncio.Semaphore(at_once)

        async def one(ad: TaskAd) -> TaskResult:
            async with room:
                session = await self._open(ad)
                async with task_client.published(
                    session.bus, ad, deltas=False, cancel_with_caller=cancel_with_caller
                ) as handle:
                    return await handle.result()

        waiting = [asyncio.ensure_future(one(ad_of(ad))) for ad in ads]
        try:
            return list(await asyncio.gather(*waiting))
        finally:  # after an error, too, none of them goes on
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def feedback(self, task_id: str, score: float, *, reason: str = "") -> None:
        """Publish the judgement of a person, whom LOOM_SOURCE names, of an ended task to the RewardBus.

        Args:
            task_id: A task that a node has worked on.
            score: 0 useless to 1 perfect.
            reason: For people.

        Raises:
            UnknownTask: No such task.
            InvalidTask: No node has worked on it, or the score is out of range.
        """
        if not isinstance(task_id, str):
            raise InvalidTask(f"task_id must be a text, not a {type(task_id).__name__}", field="task_id")
        session = await self._open()
        record = await task_client.record(session.bus, task_id)
        if record is None:
            raise InvalidTask("only a task that a node has finished can be judged", task_id=task_id)
        await self.reward_bus.publish(judgement(record, score, reason, session.bus.identity.source))

    # -- lifecycle

    async def __aenter__(self) -> Self:
        self._closed = False
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self._settings.nats_url:
            self.dispose()  # the server goes, too: nobody is left to hear of what is in hand
        await self.aclose()

    def __enter__(self) -> Self:
        if running_loop() is not None:
            raise LoomError("`with` would block the event loop of this thread; use `async with`")
        try:
            self._in_background(self.__aenter__())
        except BaseException:
            self.dispose()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._in_background(self.__aexit__(kind, error, trace))
        finally:
            self.dispose()

    def _in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run `work` in the loop that the Runtime is open in, or in a background thread's."""
        try:
            loop = self._loop_for_sync()
        except BaseException:
            work.close()
            raise
        asyncio.run_coroutine_threadsafe(work, loop).result()

    async def aclose(self) -> None:
        """Drain what is in hand and close everything; safe to call twice.

        Raises:
            WrongEventLoop: The Runtime is open in another event loop.
        """
        await self._sessions.aclose()
        self._closed = True

    def dispose(self) -> None:
        """Drop everything at once, without waiting for work in hand; from any thread, and safe to call twice."""
        self._closed = True
        self._sessions.abort()
        self._background.close()

    async def _open(self, task: TaskAd | None = None) -> Session:
        """Return the open session; a node that `task` is pinned to is announced."""
        self._check_closed()
        session = await self._sessions.open()
        self.reward_bus.bus = session.bus
        if task is not None:
            await session.announce(task.node_id)
        return session

    def _check_closed(self) -> None:
        if self._closed:
            raise LoomError("the Runtime is closed; open it again with `async with` or `with`, or make another one")

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

    def _loop_for_sync(self) -> asyncio.AbstractEventLoop:
        if running_loop() is not None:
            raise LoomError("submit_sync would block the event loop of this thread; use `await rt.submit(…)`")
        owner = self._sessions.owner
        if owner is None:
            return self._background.loop()
        if not owner.loop.is_running():
            raise owner.refusal()
        return owner.loop
