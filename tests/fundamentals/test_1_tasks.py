"""A client submits a task and reads its answer. The fixture `phases` runs the six services on a real nats-server."""

import asyncio
from collections.abc import AsyncIterator

import nats
import pytest

from loom import Runtime, TaskAd
from loom.bus.bus import Bus
from loom.schemas.errors import Cancelled, DeadlineExceeded
from loom.schemas.events import TextDelta


async def test_a_submitted_task_is_answered_by_an_agent(phases: Bus) -> None:
    """A client submits an ad, an agent wins its auction, and the client gets what the agent returns."""

    def count_words(description: str) -> str:
        return f"{len(description.split())} words"

    async with Runtime() as rt:
        rt.add_agent(count_words, name="counter", domains=["writing"])
        answer = await rt.submit(TaskAd(domain="writing", description="how many words are these"))

    assert answer == "5 words"


async def test_an_agent_streams_its_answer(phases: Bus) -> None:
    """What an agent yields reaches the client as events, and their text is the answer."""

    async def count(description: str) -> AsyncIterator[str]:
        for number in ("one ", "two ", description):
            yield number

    async with Runtime() as rt:
        rt.add_agent(count, name="counter")
        handle = await rt.publish(TaskAd(description="three"))
        texts = [delta.event.text async for delta in handle.events() if isinstance(delta.event, TextDelta)]
        result = await handle.result()

    assert "".join(texts) == "one two three"
    assert result.content == "one two three"


async def test_a_client_of_any_language_sends_one_request(phases: Bus, nats_url: str, namespace: str) -> None:
    """A JSON request to the submit subject is a submission, and the reply is the result."""
    async with Runtime() as rt:
        rt.add_agent(str.upper, name="shouter")
        await rt.nodes()  # a Runtime connects at its first call
        client = await nats.connect(nats_url)
        reply = await client.request(f"{namespace}.submit", b'{"description": "hello"}', timeout=10)
        await client.close()

    assert b'"content":"HELLO"' in reply.data


async def test_a_duplicate_submission_runs_once(phases: Bus) -> None:
    """Two submissions with the same task id are one task, and both clients get its answer."""
    runs = []

    async def work(description: str) -> str:
        runs.append(description)
        return "done"

    async with Runtime() as rt:
        rt.add_agent(work, name="worker")
        ad = TaskAd(task_id="report-7", description="write the report")
        answers = await asyncio.gather(rt.submit(ad), rt.submit(ad))

    assert list(answers) == ["done", "done"]
    assert runs == ["write the report"]


async def test_a_cancelled_task_stops_its_agent(phases: Bus) -> None:
    """A client cancels a running task: its agent is cancelled and the task ends as cancelled."""
    started, stopped = asyncio.Event(), asyncio.Event()

    async def endless(description: str) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with Runtime() as rt:
        rt.add_agent(endless, name="endless")
        handle = await rt.publish(TaskAd(description="wait"))
        await started.wait()
        await handle.cancel()
        await stopped.wait()

        with pytest.raises(Cancelled):
            await handle.content()


async def test_a_task_past_its_deadline_fails(phases: Bus) -> None:
    """A task that is not done within `timeout_s` fails with DeadlineExceeded."""

    async def slow(description: str) -> None:
        await asyncio.sleep(60)

    async with Runtime() as rt:
        rt.add_agent(slow, name="slow")

        with pytest.raises(DeadlineExceeded):
            await rt.submit(TaskAd(description="hurry", timeout_s=0.5))
