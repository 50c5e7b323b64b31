import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from support.auctions import offer_to
from support.builders import call_for_bids
from support.logs import capture_logs
from support.phase_harness import Stage, quiet
from support.runs import Watcher, run, stop_run
from support.stopping import stop
from support.wait import until

from loom.agents.host.runs import BATCH_BYTES, PATIENCE_S
from loom.agents.host.timings import HostTimings
from loom.agents.llm.agent import Agent
from loom.bus.natsio.clock import ServerClock
from loom.bus.natsio.transport.message import Msg
from loom.runner.server.nats_server import NatsServer
from loom.runner.timings import ServiceTimings
from loom.schemas.auction import MAX_LOTS, Lot, Offer
from loom.schemas.base import encode
from loom.schemas.errors import AgentFailed, BudgetExceeded, Cancelled, LoomError, NodeBusy
from loom.schemas.events import Done, ReasoningDelta, TextDelta, TokenUsage
from loom.schemas.learning.lifecycle import Lifecycle
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.llm import CompletionParams, CompletionResult, StreamChunk
from loom.schemas.run import RunRequest, read_events
from loom.types import AgentNode, CapabilityProfile


@pytest.fixture
def timings() -> ServiceTimings:
    return ServiceTimings(host=HostTimings(announce_s=0.1, heartbeat_s=0.1))


async def quick(description: str) -> str:
    return f"did {description}"


async def forever(description: str) -> str:
    await asyncio.Event().wait()
    return description


def node(node_id: str = "n1", agent: Any = quick, claim: float = 0.5, tools: tuple[str, ...] = ()) -> AgentNode:
    return AgentNode(id=node_id, agent=agent, capabilities=CapabilityProfile(scores={"code": claim}, tools=list(tools)))


async def call(stage: Stage, **facts: Any) -> Offer:
    """Call for bids and return the one host's answer."""
    return await offer_to(stage.bus, call_for_bids(**facts))


# -- bids


async def test_every_free_node_bids_with_its_claim_and_true_load(stage: Stage) -> None:
    nodes = [node("n1", forever, claim=0.9, tools=("search",)), node("n2", claim=0.2)]
    host = await stage.host(nodes, slots=1, backlog=3)
    busy = await run(stage, host)
    await busy.event("started")
    await run(stage, host, task_id="t2")
    await until(lambda: nodes[0].load == 0.5, what="two of four places are taken")
    offer = await call(stage)
    one, two = offer.bids
    assert (one.node_id, one.self_rating, one.load, one.backlog) == ("n1", 0.9, 0.5, 1)
    assert (two.node_id, two.self_rating, two.load, two.backlog) == ("n2", 0.2, 0.0, 0)


async def test_bids_have_the_tokens_runs_took_so_far(stage: Stage) -> None:
    async def slow(description: str) -> str:
        await asyncio.sleep(0.05)
        return description

    host = await stage.host([node(agent=slow)])
    await (await run(stage, host)).event("result")
    assert (await call(stage)).bids[0].expected_s > 0.04


async def test_a_call_of_many_lots_gets_one_offer_whose_bids_are_for_all_of_them(stage: Stage) -> None:
    await stage.host([node("n1", claim=0.9), node("n2", claim=0.2)])
    lots = tuple(Lot(task_id=f"t{n}", attempt=1, complexity=0.5, remaining_s=60.0) for n in range(MAX_LOTS))
    offer = await call(stage, lots=lots)
    assert [bid.node_id for bid in offer.bids] == ["n1", "n2"]
    assert all(bid.is_for(lot.task_id) for bid in offer.bids for lot in lots)
    await stage.bus.requests.flush()
    assert len(stage.all("offer")) == 1


async def test_only_so_many_bids_are_offered_the_preferred_first(stage: Stage) -> None:
    await stage.host([node(f"n{i}", claim=(i + 1) / 40) for i in range(40)])
    offered = [bid.node_id for bid in (await call(stage, prefer=("n0", "n1"), limit=16)).bids]
    assert len(offered) == 16
    assert set(offered[:2]) == {"n0", "n1"}
    assert offered[2:] == [f"n{i}" for i in range(39, 25, -1)]


@pytest.mark.parametrize(
    ("facts", "bids"),
    [
        ({}, ["n2", "n1"]),
        ({"excluded": ("n2",)}, ["n1"]),
        ({"excluded": ("n1", "n2")}, []),
        ({"required_tools": ("search",)}, ["n1"]),
        ({"required_tools": ("search", "shell")}, []),
    ],
)
async def test_a_node_that_may_not_or_cannot_does_not_bid(stage: Stage, facts: dict[str, Any], bids: list[str]) -> None:
    await stage.host([node("n1", tools=("search",)), node("n2", claim=0.9)])
    offer = await call(stage, **facts)
    assert [bid.node_id for bid in offer.bids] == bids
    assert offer.decline == (None if bids else "unqualified")


async def test_a_node_without_an_agent_bids_once_it_gets_one(stage: Stage) -> None:
    late = node(agent=None)
    host = await stage.host([late])
    assert (await call(stage)).decline == "unqualified"
    assert (await (await run(stage, host)).event("rejected")).code == "unqualified"
    late.agent = quick
    assert (await call(stage)).bids


async def test_a_full_node_is_busy_and_refuses_a_run(stage: Stage) -> None:
    host = await stage.host([node(agent=forever)], slots=1, backlog=1)
    for n in range(2):
        await (await run(stage, host, task_id=f"t{n}")).event("accepted")
    assert (await call(stage)).decline == "busy"
    assert (await call(stage, excluded=("n1",))).decline == "unqualified"
    assert (await (await run(stage, host, task_id="t9")).event("rejected")).code == "busy"


async def test_a_run_for_a_node_of_another_host_is_rejected(stage: Stage) -> None:
    host = await stage.host([node()])
    assert (await (await run(stage, host, node_id="gone")).event("rejected")).code == "unqualified"


async def test_bytes_that_are_not_a_call_or_a_request_do_no_harm(stage: Stage) -> None:
    host = await stage.host([node()])
    watcher = Watcher(stage.bus)
    await stage.bus.connection.publish(stage.bus.subjects.of("auction", "code"), b"\xff")
    await stage.bus.connection.publish(stage.bus.subjects.of("stop", "local", host.host_id), b"{")
    await watcher.send(host, b"{")
    assert (await watcher.event("rejected")).code == "unqualified"
    assert (await call(stage)).bids


# -- runs


async def test_a_run_publishes_its_progress_in_numbered_events(stage: Stage) -> None:
    host = await stage.host([node()])
    watcher = await run(stage, host)
    result = (await watcher.event("result")).result
    assert result is not None
    assert result.content == "did it"
    assert watcher.kinds()[:2] == ["accepted", "started"]
    assert [event.seq for event in watcher.events] == list(range(len(watcher.events)))
    assert "".join(e.event.text for e in watcher.events if isinstance(e.event, TextDelta)) == "did it"


async def test_all_events_of_a_short_run_come_in_one_message(stage: Stage) -> None:
    host = await stage.host([node()])
    watcher = await run(stage, host)
    await watcher.event("result")
    assert len(watcher.bodies) == 2
    assert [event.seq for event in watcher.events] == list(range(len(watcher.events)))


async def test_a_run_is_accepted_before_an_agent_gets_the_loop_that_may_keep_it(stage: Stage) -> None:
    async def moody(description: str) -> str:
        if description == "block":
            time.sleep(0.1)  # noqa: ASYNC251 - what users do
        return description

    host = await stage.host([node(agent=moody)])
    for task_id, description in (("t1", "it"), ("t2", "block")):  # a quick run promises nothing of the next
        watcher = await run(stage, host, task_id=task_id, description=description)
        await watcher.event("result")
        assert [event.kind for event in read_events(watcher.bodies[0])] == ["accepted"]


async def test_a_run_ends_with_any_content_of_its_last_event(stage: Stage) -> None:
    class Mute(LoomError):
        def __init__(self) -> None:
            pass  # and so has no message

    odd: dict[str, Any] = {
        "rounds": Done(content="x", steps="three"),  # type: ignore[arg-type]  # as a user may pass
        "less": Done(content="x", steps=-1),
        "half": Done(content="x", usage=TokenUsage(prompt_tokens=1.5)),  # type: ignore[arg-type]
        "spent": AgentFailed("gave up", spent=Done(content="x", steps="three")),  # type: ignore[arg-type]
        "none": AgentFailed("gave up", spent=Done(content="x", usage=None)),  # type: ignore[arg-type]
        "mute": Mute(),
    }

    class Odd:
        async def stream(self, job: RunRequest) -> AsyncIterator[Any]:
            last = odd[job.description]
            if isinstance(last, Exception):
                raise last
            yield last

    host = await stage.host([node(agent=Odd())], slots=len(odd))
    watchers = [await run(stage, host, task_id=f"t-{name}", description=name) for name in odd]
    assert [await watcher.code() for watcher in watchers] == ["agent_failed"] * len(odd)
    assert watchers[3].events[-1].error.message == "gave up"  # type: ignore[union-attr]


async def test_the_text_of_an_agent_comes_in_messages_of_bounded_size(stage: Stage) -> None:
    async def talk(description: str) -> AsyncIterator[str]:
        for size in (1, 4000) * 100:
            yield "x" * size

    class Reasons:
        async def stream(self, _job: RunRequest) -> AsyncIterator[Any]:
            yield ReasoningDelta(text="x" * 2 * BATCH_BYTES)
            yield Done(content="x" * BATCH_BYTES)

    host = await stage.host([node("n1", talk), node("n2", Reasons())])
    many, large = await run(stage, host), await run(stage, host, task_id="t2", node_id="n2")
    for watcher in (many, large):
        await watcher.event("result")
        assert [event.seq for event in watcher.events] == list(range(len(watcher.events)))
        for body in watcher.bodies:
            events = read_events(body)
            assert len(body) <= BATCH_BYTES + len(events) + 1 or len(events) == 1
    assert len(many.bodies) < len(many.events) / 10


@pytest.mark.slow
async def test_an_agent_that_never_waits_is_slowed_to_the_pace_of_the_server(
    server: NatsServer, namespace: str, timings: ServiceTimings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loom.agents.protocol.MAX_TEXT_CHARS", 10**9)
    published, most, moved_at = 0, 25_000, time.monotonic()

    async def talk(description: str) -> AsyncIterator[str]:
        nonlocal published, moved_at
        while published < most:  # 100 MB unless it is slowed
            published, moved_at = published + 1, time.monotonic()
            yield "x" * 4000

    async with Stage(server.url, namespace, timings) as stage:
        host = await stage.host([node(agent=talk)])
        stop(server.pid)
        try:
            request = RunRequest(task_id="t1", node_id="n1", description="it")
            reply = host.bus.subjects.of("event", "local", host.host_id, "none", "none")
            host._on_run(Msg("", reply, encode(request)))
            await until(lambda: published and time.monotonic() - moved_at > 0.5, within_s=8, what="it waits")
            assert published < most / 2
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await until(lambda: published == most, within_s=60, what="it goes on")


async def test_runs_beyond_the_slots_queue_by_priority_and_send_heartbeats(stage: Stage) -> None:
    order: list[str] = []
    gate = asyncio.Semaphore(0)

    async def work(job: RunRequest) -> str:
        order.append(job.task_id)
        await gate.acquire()
        return "x"

    host = await stage.host([node(agent=work)], slots=1, backlog=9)
    first = await run(stage, host, task_id="first")
    await first.event("started")
    waiting = {}
    for name in ("low", "normal", "critical", "high"):
        waiting[name] = await run(stage, host, task_id=name, priority=name)
        await waiting[name].event("accepted")
    await waiting["low"].event("heartbeat", count=2)
    assert waiting["low"].kinds() == ["accepted"]
    for _ in range(5):
        gate.release()
    await waiting["low"].event("result")
    assert order == ["first", "critical", "high", "normal", "low"]


async def test_a_node_shows_whether_it_works(stage: Stage) -> None:
    busy = node(agent=forever)
    host = await stage.host([busy])
    await (await run(stage, host)).event("started")
    assert (busy.status, busy.load > 0) == ("busy", True)
    await stop_run(stage.bus, host)
    await until(lambda: (busy.status, busy.load) == ("idle", 0), what="it is idle again")


def raising(error: BaseException) -> Callable[[str], Any]:
    async def agent(description: str) -> str:
        raise error

    return agent


class Stubborn:
    """Streams the given events."""

    def __init__(self, *events: Any) -> None:
        self.events = events

    async def stream(self, _job: RunRequest) -> AsyncIterator[Any]:
        for event in self.events:
            if isinstance(event, BaseException):
                raise event
            yield event


async def empty(description: str) -> str:
    return " " * len(description)


@pytest.mark.parametrize(
    "agent",
    [
        raising(RuntimeError("secret")),
        raising(SystemExit(1)),
        raising(asyncio.CancelledError()),
        raising(LoomError("plain")),
        raising(NodeBusy("would repeat without end")),
        raising(Cancelled("is not allowed from an agent")),
        raising(RuntimeError("half a pair: \ud83d")),
        raising(AgentFailed("half a pair: \ud83d")),
        raising(AgentFailed(7)),  # type: ignore[arg-type]
        raising(AgentFailed("later", retry_after_s=-1)),
        raising(AgentFailed("later", retry_after_s=float("inf"), field=7)),
        raising(AgentFailed("later", retry_after_s="soon")),
        raising(AgentFailed("later", retry_after_s=10**400)),
        empty,
        Stubborn(),
        Stubborn(Done(content="")),
        Stubborn(RuntimeError("x")),
        Stubborn(asyncio.CancelledError()),
        Stubborn(object(), Done(content="x")),
        "not an agent",
    ],
)
async def test_an_agent_that_raises_or_yields_nothing_has_failed(stage: Stage, agent: Any) -> None:
    nodes = [node(agent=agent)]
    host = await stage.host(nodes, slots=1)
    watcher = await run(stage, host)
    assert await watcher.code() == "agent_failed"
    nodes[0].agent = quick
    await (await run(stage, host, task_id="t2")).event("result")  # its slot is free again


async def test_a_spent_budget_has_an_error_code_of_its_own(stage: Stage) -> None:
    host = await stage.host([node(agent=raising(BudgetExceeded("spent")))])
    assert await (await run(stage, host)).code() == "budget_exceeded"


async def test_a_wait_an_agent_asks_for_is_passed_on(stage: Stage) -> None:
    host = await stage.host([node(agent=raising(AgentFailed("too busy", retry_after_s=7)))])
    error = (await (await run(stage, host)).event("error")).error
    assert error is not None
    assert (error.code, error.message, error.retry_after_s) == ("agent_failed", "too busy", 7)


async def test_a_node_that_leaves_before_its_run_begins_fails_it(stage: Stage) -> None:
    gate = asyncio.Event()

    async def work(description: str) -> str:
        await gate.wait()
        return description

    nodes = [node(agent=work)]
    host = await stage.host(lambda: nodes, slots=1)
    running = await run(stage, host)
    queued = await run(stage, host, task_id="t2")
    await queued.event("accepted")
    nodes.clear()
    gate.set()
    await running.event("result")
    assert await queued.code() == "agent_failed"
    await until(lambda: not host._queues.by_node, what="nothing is left of the node")


# -- idempotence


async def test_a_second_request_for_a_running_attempt_moves_its_events(stage: Stage) -> None:
    go = asyncio.Event()
    starts: list[str] = []

    async def work(description: str) -> AsyncIterator[str]:
        starts.append(description)
        yield "one "
        await go.wait()
        yield "two"

    host = await stage.host([node(agent=work)])
    first = await run(stage, host)
    await first.event("delta", count=2)  # the step's start, and a text
    second = await run(stage, host)
    await second.event("delta", count=2)
    await first.event("moved")
    third = await run(stage, host, from_seq=3)
    await second.event("moved")
    go.set()
    await third.event("result")
    assert starts == ["it"]
    assert first.kinds() == ["accepted", "started", "delta", "delta", "moved"]
    assert second.kinds() == ["accepted", "started", "delta", "delta", "moved"]
    assert third.kinds()[:2] == ["accepted", "delta"]
    assert next(event.seq for event in third.events if event.kind == "delta") == 3
    assert [event.seq for event in third.events] == sorted(event.seq for event in third.events)


async def test_a_request_for_a_finished_attempt_repeats_its_end(stage: Stage) -> None:
    runs: list[str] = []

    async def work(description: str) -> str:
        runs.append(description)
        return "x"

    host = await stage.host([node(agent=work)])
    first = await (await run(stage, host)).event("result")
    second = await run(stage, host)
    assert await second.event("result") == first
    assert second.kinds() == ["result"]
    await (await run(stage, host, attempt=2)).event("result")
    assert len(runs) == 2


async def test_a_later_attempt_ends_an_earlier_one(stage: Stage) -> None:
    host = await stage.host([node(agent=forever)])
    first = await run(stage, host)
    await first.event("started")
    second = await run(stage, host, attempt=2)
    await second.event("started")
    assert await first.code() == "cancelled"


async def test_a_long_history_moves_in_order_while_the_run_goes_on(stage: Stage) -> None:
    go, talk = asyncio.Event(), "x" * 4000

    async def work(description: str) -> AsyncIterator[str]:
        for _ in range(600):
            yield talk
        go.set()
        while True:
            yield "more"
            await asyncio.sleep(0)

    host = await stage.host([node(agent=work)])
    first = await run(stage, host)
    await go.wait()
    second = await run(stage, host)
    await second.event("heartbeat", count=2, within_s=15)
    assert all(len(body) <= BATCH_BYTES + 1024 for body in second.bodies)
    await stop_run(stage.bus, host)
    await second.event("error", within_s=15)
    await first.event("moved", within_s=15)
    numbers = [event.seq for event in second.events]
    assert numbers == sorted(numbers)


# -- cancel and deadline


def blocking(seconds: float, ended: threading.Event) -> Callable[[str], str]:
    def agent(description: str) -> str:
        ended.wait(seconds)
        return description

    return agent


async def test_a_run_is_cancelled_within_a_second_even_in_a_thread(stage: Stage) -> None:
    ended = threading.Event()
    host = await stage.host([node("n1", blocking(20, ended)), node("n2", forever)], slots=1)
    threaded = await run(stage, host)
    awaiting = await run(stage, host, node_id="n2", task_id="t2")
    queued = await run(stage, host, node_id="n2", task_id="t3")
    await threaded.event("started")
    await queued.event("accepted")
    started = time.monotonic()
    for task_id in ("t1", "t2", "t3"):
        await stop_run(stage.bus, host, task_id)
    for watcher in (threaded, awaiting, queued):
        assert await watcher.code() == "cancelled"
    assert time.monotonic() - started < 1
    assert "started" not in queued.kinds()
    next_one = await run(stage, host, task_id="t4")
    await next_one.event("started")  # the slot is free, though the thread still runs
    ended.set()
    await next_one.event("result")


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "{ns}.reward.rules.local.n1.code",
        "{ns}.event.local.another-host.execute-1.key",
        "{ns}.event.acme.{host}.execute-1.key",
        "{ns}.event.local.{host}.execute-1",
        "another.event.local.{host}.execute-1.key",
        "_INBOX.x",
    ],
)
async def test_a_run_request_whose_events_would_go_elsewhere_is_refused_and_counted(stage: Stage, reply: str) -> None:
    host = await stage.host([node()])
    received: list[Msg] = []
    subject = reply.format(ns=stage.namespace, host=host.host_id)
    if subject:
        await stage.bus.connection.subscribe_sync(subject, received.append)
    request = RunRequest(task_id="t1", node_id="n1", description="it")
    await stage.bus.connection.publish(stage.bus.subjects.of("run", "local", host.host_id), request, reply=subject)
    await stage.bus.connection.publish(stage.bus.subjects.of("run", "local", host.host_id), b"{", reply=subject)
    await until(lambda: host.bus.discards.counts["run_request_refused"] == 2, what="both are counted")
    await quiet(stage.bus, host.bus)
    assert (received, host._runs.active()) == ([], [])


async def test_a_stop_ends_the_attempt_it_names_and_no_other(stage: Stage) -> None:
    host = await stage.host([node(agent=forever)])
    watcher = await run(stage, host, attempt=2)
    await watcher.event("started")
    await stop_run(stage.bus, host, attempt=1)
    await stop_run(stage.bus, host, "t2", attempt=2)
    await watcher.event("heartbeat", count=2)
    assert not watcher.has("error")
    await stop_run(stage.bus, host, attempt=2)
    assert await watcher.code() == "cancelled"


async def test_a_host_does_not_listen_to_cancels(stage: Stage) -> None:
    host = await stage.host([node(agent=forever)])
    watcher = await run(stage, host)
    await watcher.event("started")
    await stage.bus.connection.publish(stage.bus.subjects.of("cancel", "t1"))
    await stage.bus.connection.publish(stage.bus.subjects.of("cancelled", "t1"))
    await watcher.event("heartbeat", count=2)
    assert not watcher.has("error")


async def test_a_stop_that_overtakes_its_run_request_holds(stage: Stage) -> None:
    host = await stage.host([node(agent=forever)])
    await stop_run(stage.bus, host)
    watcher = await run(stage, host)

    assert await watcher.code() == "cancelled"
    assert watcher.kinds() == ["error"]


async def test_a_node_is_announced_once_it_has_an_agent(stage: Stage) -> None:
    empty = node(agent=None)
    await stage.host([empty])
    assert (await stage.seen("host")).nodes == ()
    empty.agent = quick

    assert (await stage.seen("lifecycle", kind="joined")).node_id == "n1"


async def test_no_event_is_published_after_the_last_one(stage: Stage) -> None:
    class Deaf:
        async def stream(self, _job: RunRequest) -> AsyncIterator[Any]:
            while True:
                try:
                    await asyncio.sleep(0.05)
                except asyncio.CancelledError:
                    yield TextDelta(text="still here")
                    yield Done(content="too late")
                    return

    host = await stage.host([node(agent=Deaf())])
    watcher = await run(stage, host)
    await watcher.event("started")
    await stop_run(stage.bus, host)
    assert await watcher.code() == "cancelled"
    await until(lambda: not host._queues.get_or_create("n1").running, what="it has come to its end")
    await quiet(stage.bus, host.bus)
    assert watcher.kinds() == ["accepted", "started", "error"]


async def test_a_run_past_its_deadline_ends(stage: Stage) -> None:
    host = await stage.host([node(agent=forever)])
    watcher = await run(stage, host, remaining_s=0.2)
    started = time.monotonic()
    assert await watcher.code() == "deadline_exceeded"
    assert time.monotonic() - started < 1


async def test_time_in_the_backlog_counts_against_the_deadline(stage: Stage) -> None:
    given: list[float] = []
    go = asyncio.Event()

    async def work(job: RunRequest) -> str:
        given.append(job.remaining_s)
        await go.wait()
        return "x"

    host = await stage.host([node(agent=work)], slots=1)
    await run(stage, host, remaining_s=60)
    later = await run(stage, host, task_id="t2", remaining_s=60)
    expired = await run(stage, host, task_id="t3", remaining_s=0.2)
    assert await expired.code() == "deadline_exceeded"
    go.set()
    await later.event("result")
    assert given[1] < 59.9
    assert expired.kinds() == ["accepted", "error"]


@pytest.mark.parametrize(
    "old",
    [
        {"sent": -30.0},
        {"sent": -PATIENCE_S - 0.5},
        {"deadline": -0.01},
        {"sent": -8.0, "deadline": -3.0},
        {"sent": -8.0, "deadline": 60.0, "attempt": 2},
        {"sent": 0.0, "deadline": -0.01, "attempt": 2},
    ],
)
async def test_an_old_request_starts_no_run(stage: Stage, old: dict[str, Any]) -> None:
    begun: list[str] = []

    async def work(job: RunRequest) -> str:
        begun.append(job.task_id)
        return "x"

    host = await stage.host([node(agent=work)])
    now = stage.bus.clock.now()
    facts = {name: now + old[key] for name, key in (("sent_at", "sent"), ("deadline", "deadline")) if key in old}
    with capture_logs() as logs:
        watcher = await run(stage, host, attempt=old.get("attempt", 1), **facts)
        await (await run(stage, host, task_id="t2", sent_at=now, deadline=now + 60)).event("result")
    assert begun == ["t2"]
    assert watcher.events == []
    assert [log["task_id"] for log in logs if log["event"] == "run_request_ignored"] == ["t1"]


async def test_a_host_without_the_servers_time_uses_the_remaining_seconds(stage: Stage) -> None:
    host = await stage.host([node()])
    host.bus.clock = ServerClock()
    now = stage.bus.clock.now()
    await (await run(stage, host, sent_at=now - 30, deadline=now - 10, remaining_s=20)).event("result")


async def test_an_old_request_still_moves_a_current_run_and_repeats_its_result(stage: Stage) -> None:
    go = asyncio.Event()

    async def work(description: str) -> str:
        await go.wait()
        return "x"

    host = await stage.host([node(agent=work)])
    await run(stage, host)
    second = await run(stage, host, sent_at=stage.bus.clock.now() - 30)
    await second.event("accepted")
    go.set()
    await second.event("result")
    await (await run(stage, host, sent_at=stage.bus.clock.now() - 30)).event("result")


async def test_a_run_ends_at_the_deadline_of_its_request_however_late_that_is_read(stage: Stage) -> None:
    host = await stage.host([node(agent=forever)])
    now = stage.bus.clock.now()
    watcher = await run(stage, host, remaining_s=60, sent_at=now - 2, deadline=now + 0.3)
    assert await watcher.code() == "deadline_exceeded"


async def test_a_queued_run_does_not_begin_past_its_deadline(stage: Stage) -> None:
    """Its slot becomes free before the next heartbeat checks it."""
    stage.timings = ServiceTimings(host=HostTimings(announce_s=0.1, heartbeat_s=30))
    begun: list[str] = []
    go = asyncio.Event()

    async def work(job: RunRequest) -> str:
        begun.append(job.task_id)
        await go.wait()
        return "x"

    host = await stage.host([node(agent=work)], slots=1)
    await run(stage, host)
    late = [await run(stage, host, task_id=f"late{n}", deadline=stage.bus.clock.now() + 0.2) for n in range(2)]
    last = await run(stage, host, task_id="last")
    await last.event("accepted")
    await until(
        lambda: all(each.left_s <= 0 for each in host._runs.active() if each.request.deadline), what="it is late"
    )
    go.set()
    await last.event("result")
    assert [await each.code() for each in late] == ["deadline_exceeded"] * 2
    assert begun == ["t1", "last"]


# -- isolation


class Recorder:
    """A model that answers with all it was shown, slowly."""

    def __init__(self) -> None:
        self.together = asyncio.Barrier(2)

    async def complete(self, params: CompletionParams) -> CompletionResult:
        raise NotImplementedError

    async def stream(self, params: CompletionParams) -> AsyncIterator[StreamChunk]:
        await self.together.wait()
        yield StreamChunk(text=" | ".join(message.content for message in params.messages))
        await self.together.wait()
        yield StreamChunk(finish_reason="stop")


async def test_two_tasks_at_once_never_see_each_others_text(stage: Stage) -> None:
    host = await stage.host([node(agent=Agent(Recorder(), system_prompt="be kind"))], slots=2)
    for attempt in (1, 2):
        one = await run(stage, host, task_id="t1", attempt=attempt, description="apples")
        two = await run(stage, host, task_id="t2", attempt=attempt, description="pears")
        contents = [(await watcher.event("result")).result for watcher in (one, two)]
        assert [found and found.content for found in contents] == ["be kind | apples", "be kind | pears"]


# -- announcements


async def test_a_host_announces_itself_regularly_and_when_asked(stage: Stage) -> None:
    host = await stage.host([node("n1"), node("n2")], slots=3)
    announcement = await stage.seen("host", host_id=host.host_id, count=3)
    assert (
        announcement.node_ids,
        announcement.slots,
        announcement.running,
        announcement.queued,
        announcement.draining,
    ) == (("n1", "n2"), 6, 0, 0, False)
    await stage.bus.connection.publish(stage.bus.subjects.hosts)
    await stage.seen("host", host_id=host.host_id, count=len(stage.all("host")) + 1)


async def test_announcements_count_running_and_queued_runs(stage: Stage) -> None:
    host = await stage.host([node(agent=forever)], slots=1)
    for n in range(3):
        await (await run(stage, host, task_id=f"t{n}")).event("accepted")
    await until(lambda: stage.all("host")[-1].queued == 2, what="two queue")
    assert stage.all("host")[-1].running == 1


async def test_nodes_that_come_and_go_are_announced(stage: Stage) -> None:
    nodes = [node("n1")]
    host = await stage.host(lambda: nodes)
    joined = await stage.seen("lifecycle", kind="joined", node_id="n1")
    assert joined.host_id == host.host_id
    nodes.append(node("n2"))
    await stage.seen("lifecycle", kind="joined", node_id="n2")
    assert [bid.node_id for bid in (await call(stage)).bids] == ["n1", "n2"]
    nodes.pop(0)
    await stage.seen("lifecycle", kind="left", node_id="n1")
    assert [bid.node_id for bid in (await call(stage)).bids] == ["n2"]
    assert not stage.all("lifecycle", kind="left", node_id="n2")


async def test_the_learned_profile_of_a_node_is_mirrored_into_it(stage: Stage) -> None:
    mine = node("n1")
    await stage.host([mine])
    subject = stage.bus.subjects.of
    for node_id, tasks in (("another", 9), ("n1", 7)):
        profile = NodeProfile(node_id=node_id, total_tasks=tasks, success_rate=0.25, consecutive_losses=2)
        news = Lifecycle(kind="learned", node_id=node_id, at=0, profile=profile)
        await stage.bus.connection.publish(subject("lifecycle", "adapt", "learned", "local", node_id), news)
    await until(lambda: mine.capabilities.total_tasks == 7, what="it is mirrored")
    assert (mine.capabilities.success_rate, mine.consecutive_losses) == (0.25, 2)


# -- drains


async def test_a_draining_host_finishes_its_runs_and_takes_no_more(stage: Stage) -> None:
    go = asyncio.Event()

    async def work(description: str) -> str:
        await go.wait()
        return description

    host = await stage.host([node(agent=work)], slots=1)
    running, queued = await run(stage, host), await run(stage, host, task_id="t2")
    await running.event("started")
    await queued.event("accepted")
    draining = asyncio.ensure_future(host.drain(5))
    assert await queued.code() == "node_busy"  # the run had not begun: another node may take it
    assert (await call(stage)).decline == "draining"
    assert (await (await run(stage, host, task_id="t3")).event("rejected")).code == "busy"
    assert stage.all("host", host_id=host.host_id)[-1].draining
    go.set()
    await running.event("result")
    await draining
    await stage.seen("lifecycle", kind="left", node_id="n1")
    assert queued.kinds() == ["accepted", "error"]


async def test_runs_a_drain_has_no_time_for_are_given_back(stage: Stage) -> None:
    host = await stage.host([node(agent=forever)])
    watcher = await run(stage, host)
    await watcher.event("started")
    await host.drain(0.1)
    assert await watcher.code() == "node_busy"
    await host.drain(0.1)
    assert watcher.kinds()[-1] == "error"


async def test_a_host_whose_connection_is_closed_gives_its_runs_back(stage: Stage) -> None:
    host = await stage.host([node(agent=forever)])
    watcher = await run(stage, host)
    await watcher.event("started")
    await host.bus.close()
    assert await watcher.code() == "node_busy"
