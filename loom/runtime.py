"""The Python front door: a cluster of agents, and tasks handed to it."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Collection, Iterable, Sequence
from contextvars import copy_context
from hashlib import blake2b
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import msgspec

from loom.ads import AnyAd, ad_of, as_type, with_schema
from loom.agents.function_agent import as_agent
from loom.agents.llm.agent import Agent
from loom.agents.llm.config import AgentConfig, settings_without_effect
from loom.agents.tools import Tool
from loom.background_loop import BackgroundLoop
from loom.bus import tasks
from loom.bus.log import get_logger
from loom.bus.ownership import THREADSAFE, Owner, running_loop
from loom.bus.reward_bus import RewardBus, judgement
from loom.bus.tasks import TaskHandle
from loom.claims import AnyCapabilities, domains_of, profile_of
from loom.cluster.lifecycle import LifecycleManager
from loom.cluster.manager import ClusterManager, InvalidNode
from loom.cluster.skill_nodes import skill_nodes
from loom.cluster.skill_registry import SkillNodeRegistry
from loom.runner.node_overview import NodeOverview, node_overviews
from loom.runner.session import Inheritance, Session
from loom.runner.session_owner import SessionOwner
from loom.runner.settings import Settings, from_environment
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import TaskRecord
from loom.schemas.errors import BusUnavailable, InvalidTask, LoomError
from loom.schemas.llm import AnyProvider
from loom.schemas.task import TaskAd, TaskResult
from loom.types import AgentNode, CapabilityProfile, HealthReport

T = TypeVar("T")

log = get_logger()


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
        provider: AnyProvider | None = None,
        config: AgentConfig | None = None,
        *,
        cluster_config: ClusterConfig | None = None,
    ) -> None:
        self.provider = provider
        self.config = config or AgentConfig()
        self.cluster = ClusterManager()
        self.reward_bus = RewardBus()
        self._settings: Settings = from_environment()
        self._cluster_config = cluster_config or self._settings.cluster
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
        """Return the answer to a task.

        Args:
            task: The work: an ad, a dict of an ad's fields, or a text.
            returns: The type of the answer: a dataclass, a pydantic model, a TypedDict, `list[int]`, …. Its JSON Schema
                becomes the ad's `accept.json_schema`, unless the ad has one, and the answer is read as JSON of it.
            cancel_with_caller: Whether the task is cancelled when this call is, as by `asyncio.timeout`; otherwise
                the task goes on, and only its answer is dropped.

        Raises:
            LoomError: The task failed; the class and its code say how.
            RejectedResult: The answer is not of the type.
            WrongEventLoop: The Runtime is open in another event loop.

        Example:
            >>> await rt.submit("Which year was NATS first released?", returns=int)
            2010
        """
        ad = with_schema(ad_of(task), returns)
        session = await self._open()
        async with tasks.published(session.bus, ad, deltas=False, cancel_with_caller=cancel_with_caller) as handle:
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
            LoomError: The task failed, or this thread runs an event loop: use `await submit(…)` there.
            RejectedResult: The answer is not of the type.
            TimeoutError: There is no answer in `timeout_s`.
            WrongEventLoop: The Runtime is open in an event loop that does not run now.
            BusUnavailable: The Runtime was closed meanwhile.
        """
        ad = ad_of(task)
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
        session = await self._open()
        return await tasks.publish(session.bus, ad)

    async def submit_many(
        self, ads: Sequence[AnyAd], *, at_once: int = 64, cancel_with_caller: bool = False
    ) -> list[TaskResult]:
        """Return the results of all tasks in their order; one that failed says so in its `error`.

        Args:
            ads: Any number, each as for `submit`.
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

        waiting = [asyncio.ensure_future(one(ad_of(ad))) for ad in ads]
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
