"""Operators watch the traffic, restart phases and read the messages that could not be handled."""

from support.services import running_phases
from support.wait import until

from loom import Runtime, TaskAd
from loom.bus import task_client
from loom.bus.bus import Bus
from loom.bus.dead_letters.admin import list_letters
from loom.bus.tap import Tap
from loom.schemas.envelope import PHASES


async def test_the_tap_shows_every_hop_of_a_task(phases: Bus, client: Bus) -> None:
    """A tap reads the messages of the namespace as they pass."""
    async with Runtime() as rt, Tap(client, ["task", "result"]) as tap:
        rt.add_agent(str.upper, name="shouter")
        await rt.submit(TaskAd(task_id="t1", description="hello"))
        messages = [await anext(tap) for _ in range(4)]

    hops = [message.tokens["phase"] for message in messages if message.family == "task"]
    assert hops == ["match", "execute", "evaluate"]


async def test_a_phase_restarts_and_no_task_is_lost(on_bus: tuple[str, str]) -> None:
    """A task that is submitted while a phase is down waits in a stream until that phase is back."""
    url, namespace = on_bus
    others = [phase for phase in PHASES if phase != "execute"]
    async with running_phases(url, namespace=namespace, names=others), Runtime() as rt:
        rt.add_agent(str.upper, name="shouter")
        async with running_phases(url, namespace=namespace, names=["execute"]):
            first = await rt.submit(TaskAd(description="hello"))
        handle = await rt.publish(TaskAd(description="again"))
        async with running_phases(url, namespace=namespace, names=["execute"]):
            second = await handle.content()

    assert (first, second) == ("HELLO", "AGAIN")


async def test_a_message_that_cannot_be_handled_is_a_dead_letter(phases: Bus, client: Bus) -> None:
    """A phase moves a message that it cannot decode to the stream of dead letters."""
    await client.jetstream.publish(client.subjects.task("scale", "normal", "t1"), b"not an envelope")
    dead = await until(lambda: list_letters(client, limit=10), what="a dead letter is stored")

    assert [(letter.body, letter.facts.phase) for letter in dead] == [(b"not an envelope", "scale")]


async def test_the_status_of_a_task_is_kept_over_a_restart(on_bus: tuple[str, str], client: Bus) -> None:
    """The result of a task can be read after all phases and the client have been restarted."""
    url, namespace = on_bus
    async with running_phases(url, namespace=namespace), Runtime() as rt:
        rt.add_agent(str.upper, name="shouter")
        result = await (await rt.publish(TaskAd(task_id="t1", description="hello"))).result()

    async with running_phases(url, namespace=namespace):
        status = await task_client.status(client, "t1")

    assert status == result
    assert status.content == "HELLO"
