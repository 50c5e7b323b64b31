"""The agents of a host's nodes: domains, starts and closes, costs, and ads that cannot be used."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from support.auctions import offer_to
from support.builders import call_for_bids
from support.logs import capture_logs
from support.nodes import echo, node
from support.phase_harness import Stage
from support.runs import Watcher, run
from support.wait import until

from loom import InvalidTask, Job
from loom.agents import lifetime
from loom.agents.host.autoscaler import choose_template
from loom.schemas.auction import Offer, SpawnRequest
from loom.schemas.errors import AgentFailed, LoomError
from loom.types import AgentNode, CapabilityProfile


async def call(stage: Stage, domain: str = "code") -> Offer:
    """Call for bids and return the one host's answer."""
    return await offer_to(stage.bus, call_for_bids(domain))


def bidders(offer: Offer) -> list[str]:
    return [bid.node_id for bid in offer.bids]


# -- domains


async def test_a_node_bids_in_its_domains_alone_in_any_wording_of_them(stage: Stage) -> None:
    await stage.host([AgentNode(id="n1", agent=echo, domains=["Code", "代码"])])

    assert bidders(await call(stage)) == ["n1"]
    outside = await call(stage, "sales")
    assert (bidders(outside), outside.decline) == ([], "unqualified")
    assert bidders(await call(stage, "general")) == []


async def test_a_node_that_rates_itself_0_does_not_bid(stage: Stage) -> None:
    await stage.host([node("n1", echo, code=0.0), node("n2", echo, code=0.01)])

    assert bidders(await call(stage)) == ["n2"]
    assert set(bidders(await call(stage, "sales"))) == {"n1", "n2"}


async def test_a_node_without_domains_bids_everywhere(stage: Stage) -> None:
    await stage.host([AgentNode(id="n1", agent=echo)])
    assert bidders(await call(stage, "anything")) == ["n1"]


async def test_a_pinned_run_needs_no_domain(stage: Stage) -> None:
    host = await stage.host([AgentNode(id="n1", agent=echo, domains=["sales"])])
    await (await run(stage, host, domain="code")).event("result")


async def test_a_node_is_not_cloned_for_a_domain_it_does_not_take() -> None:
    busy = AgentNode(id="n1", agent=echo, domains=["code"], load=1.0)
    assert choose_template(SpawnRequest(domain_token="sales"), [busy], 4) == "unqualified"
    assert choose_template(SpawnRequest(domain_token="code"), [busy], 4) is busy


# -- ads that cannot be used


async def ended(stage: Stage, agent: Any, **facts: Any) -> Any:
    host = await stage.host([AgentNode(id="n1", agent=agent)])
    return await (await run(stage, host, **facts)).event("error")


async def test_an_agent_that_cannot_use_the_ad_fails_its_run_with_the_field(stage: Stage) -> None:
    def refuses(text: str) -> str:
        raise InvalidTask(f"there is not a file {text}", field="context.file")

    error = (await ended(stage, refuses)).error

    assert (error.code, error.message, error.field) == ("invalid_task", "there is not a file it", "context.file")
    assert error.node_id == "n1"


async def test_an_object_with_stream_may_raise_invalid_task_and_odd_fields_are_left_out(stage: Stage) -> None:
    class Refuses:
        async def stream(self, job: Job) -> AsyncIterator[Any]:
            yield "x"
            raise InvalidTask("no", field=7, task_id=job.task_id)

    error = (await ended(stage, Refuses())).error
    assert (error.code, error.field) == ("invalid_task", None)


async def test_an_invalid_ad_delegated_by_an_agent_is_not_an_error_of_its_task(stage: Stage) -> None:
    def submits(text: str) -> str:
        raise InvalidTask(f"description of another task is empty: {text}", field="description", task_id="other")

    error = (await ended(stage, submits)).error
    assert (error.code, error.field) == ("agent_failed", None)


async def test_error_codes_of_the_cluster_are_not_accepted_from_an_agent(stage: Stage) -> None:
    class Overloads(LoomError):
        code = "overloaded"

    def raises(text: str) -> str:
        raise Overloads(text)

    assert (await ended(stage, raises)).error.code == "agent_failed"


# -- costs


async def test_a_run_that_reports_beyond_its_budget_ends_with_its_spent_tokens(stage: Stage) -> None:
    def greedy(job: Job) -> str:
        job.report(prompt_tokens=9, completion_tokens=3, cost_usd=0.25)
        return "never"

    event = await ended(stage, greedy, token_budget=10)

    assert event.error.code == "budget_exceeded"
    assert (event.result.prompt_tokens, event.result.completion_tokens, event.result.usd) == (9, 3, 0.25)


async def test_the_usage_a_run_reports_is_in_its_result(stage: Stage) -> None:
    async def modest(job: Job) -> str:
        job.report(tokens=9, cost_usd=0.25)
        return "done"

    host = await stage.host([AgentNode(id="n1", agent=modest)])
    result = (await (await run(stage, host, token_budget=10)).event("result")).result

    assert result is not None
    assert (result.tokens, result.usd) == (9, 0.25)


# -- starts and closes


class Connected:
    """An agent with a connection of its own, opened and closed in one task."""

    def __init__(self, *, broken: int = 0) -> None:
        self.calls: Counter[str] = Counter()
        self.open = False
        self._broken = broken
        self._task: Any = None

    async def start(self) -> None:
        self.calls["start"] += 1
        await asyncio.sleep(0)
        if self.calls["start"] <= self._broken:
            raise OSError("a secret address")
        self.open, self._task = True, asyncio.current_task()

    async def close(self) -> None:
        assert asyncio.current_task() is self._task
        self.calls["close"] += 1
        self.open = False

    async def __call__(self, text: str) -> str:
        assert self.open
        self.calls["run"] += 1
        return text


async def test_an_agent_is_started_once_before_its_first_run_and_closed_after_the_drain(stage: Stage) -> None:
    agent = Connected()
    host = await stage.host([AgentNode(id="n1", agent=agent), AgentNode(id="n2", agent=agent)])
    assert not agent.calls

    watchers = [await run(stage, host, task_id=f"t{n}", node_id=f"n{1 + n % 2}") for n in range(4)]
    for watcher in watchers:
        await watcher.event("result")
    assert agent.calls == {"start": 1, "run": 4}

    await host.drain(1)
    assert agent.calls == {"start": 1, "run": 4, "close": 1}


async def test_an_agent_that_never_ran_is_neither_started_nor_closed(stage: Stage) -> None:
    agent = Connected()
    await (await stage.host([AgentNode(id="n1", agent=agent)])).drain(1)
    assert not agent.calls


async def test_a_start_that_fails_fails_its_run_and_the_next_run_tries_again(stage: Stage) -> None:
    agent = Connected(broken=1)
    host = await stage.host([AgentNode(id="n1", agent=agent)])
    with capture_logs() as logs:
        error = (await (await run(stage, host)).event("error")).error
    await (await run(stage, host, task_id="t2")).event("result")

    assert error is not None
    assert (error.code, error.message) == ("agent_failed", "the agent did not start: its start raised OSError")
    assert [line["error"] for line in logs if line["event"] == "agent_start_failed"] == ["OSError: a secret address"]


async def test_a_start_that_takes_too_long_fails_its_run(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        async def start(self) -> None:
            await asyncio.Event().wait()

        async def __call__(self, text: str) -> str:
            return text

    monkeypatch.setattr(lifetime, "START_S", 0.05)
    error = (await ended(stage, Slow())).error
    assert "the agent did not start: it was not ready within 0.05 s" in error.message


async def test_a_start_may_fail_with_a_message_of_its_own(stage: Stage) -> None:
    class Refuses:
        async def start(self) -> None:
            raise AgentFailed("the tool server is not installed")

        async def __call__(self, text: str) -> str:
            return text

    error = (await ended(stage, Refuses())).error
    assert error.message == "the agent did not start: the tool server is not installed"


async def test_a_close_that_fails_or_hangs_is_logged_and_bounded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails:
        async def close(self) -> None:
            raise OSError("gone")

        async def __call__(self, text: str) -> str:
            return text

    class Hangs(Fails):
        async def close(self) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(lifetime, "CLOSE_S", 0.05)
    host = await stage.host([AgentNode(id="n1", agent=Fails()), AgentNode(id="n2", agent=Hangs())])
    for name in ("n1", "n2"):
        await (await run(stage, host, task_id=name, node_id=name)).event("result")
    with capture_logs() as logs:
        await host.drain(1)

    assert {line["event"] for line in logs} >= {"agent_close_failed", "agent_not_closed"}


async def test_a_replaced_agent_is_closed_once_its_runs_have_ended(stage: Stage) -> None:
    go_on = asyncio.Event()

    class Waits(Connected):
        async def __call__(self, text: str) -> str:
            await go_on.wait()
            return await super().__call__(text)

    old, new = Waits(), Connected()
    hosted = AgentNode(id="n1", agent=old)
    host = await stage.host([hosted])
    first: Watcher = await run(stage, host)
    await until(lambda: old.open, what="the old agent is at work")
    hosted.agent = new
    await (await run(stage, host, task_id="t2")).event("result")
    assert old.open

    go_on.set()
    await first.event("result")
    await until(lambda: not old.open, what="the old agent is closed")
    assert (old.calls["close"], new.calls["close"]) == (1, 0)


async def test_the_agent_of_a_node_that_has_left_is_closed(stage: Stage) -> None:
    agent = Connected()
    nodes = [AgentNode(id="n1", agent=agent, capabilities=CapabilityProfile())]
    host = await stage.host(lambda: nodes)  # type: ignore[arg-type, return-value]
    await (await run(stage, host)).event("result")
    nodes.clear()
    await host.announce()

    await until(lambda: agent.calls["close"] == 1, what="it is closed")
