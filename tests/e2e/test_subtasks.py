"""Events about the subtasks of a task, as received by its client."""

from typing import Any

import pytest
from support.nodes import node

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.compat.subtask_events import Subtasks
from loom.runner.services import running_nodes
from loom.schemas.events import SubtaskEvent
from loom.schemas.run import Delta, RunRequest
from loom.schemas.task import TaskAd


async def work(job: RunRequest) -> str:
    if job.description == "break":
        raise RuntimeError("it is broken")
    return f"done: {job.description}"


@pytest.fixture
async def hosted(phases: Bus, on_bus: tuple[str, str]) -> Any:
    async with running_nodes(on_bus[0], lambda: [node("ann", work, code=0.9)], namespace=on_bus[1]):
        yield


def task(*descriptions: str, **facts: Any) -> TaskAd:
    """Return an ad whose subtasks run one after the other, each named after its work."""
    plan = [
        {"id": text, "description": text, "dependencies": list(descriptions[:index])}
        for index, text in enumerate(descriptions)
    ]
    return TaskAd(domain="code", description="all of it", context={"plan": plan}, **facts)


async def events_of(bus: Bus, ad: TaskAd, *, leave_after: int = 1000) -> list[Delta | SubtaskEvent]:
    news: list[Delta | SubtaskEvent] = []
    async with Subtasks(bus, ad.task_id) as parts:
        async for one in parts.follow(await task_client.publish(bus, ad)):
            news.append(one)
            if len(news) == leave_after:
                await parts.__aexit__(None, None, None)
    return news


def reported(news: list[Delta | SubtaskEvent]) -> list[tuple[str, str, str | None, str | None, str]]:
    events = [one for one in news if isinstance(one, SubtaskEvent)]
    return [(one.subtask, one.state, one.child_state, one.node_id, one.error) for one in events]


async def test_a_subtask_that_fails_has_the_code_of_its_error(client: Bus, hosted: None) -> None:
    assert reported(await events_of(client, task("look", "break", "rest"))) == [
        ("look", "begun", None, None, ""),
        ("look", "ended", "succeeded", "ann", ""),
        ("break", "begun", None, None, ""),
        ("break", "ended", "failed", None, "agent_failed"),
    ]


async def test_lost_events_are_replaced_when_the_task_has_ended(client: Bus, hosted: None) -> None:
    ended = reported(await events_of(client, task("one", "two"), leave_after=1))

    assert ended == [
        (name, *of) for name in ("one", "two") for of in (("begun", None, None, ""), ("ended", "succeeded", "ann", ""))
    ]


async def test_a_client_subscribes_to_no_subject_of_a_phase(client: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    subscribed: list[str] = []
    original = client.connection.subscribe

    async def subscribe(subject: str, *args: Any, **options: Any) -> Any:
        subscribed.append(subject)
        return await original(subject, *args, **options)

    monkeypatch.setattr(client.connection, "subscribe", subscribe)
    async with Subtasks(client, "t1"):
        assert subscribed == [client.subjects.of("subtask", "public", "t1")]


async def test_an_undivided_task_has_only_its_own_progress(client: Bus, hosted: None) -> None:
    news = await events_of(client, TaskAd(domain="code", description="x"))

    assert news
    assert reported(news) == []
