"""Every task is auctioned: nodes bid for it, and MATCH awards it to the bidder with the highest score."""

from support.services import running_phases

from loom import Runtime, TaskAd
from loom.bus.bus import Bus
from loom.types import ClusterConfig


async def test_the_better_of_two_bidders_wins(phases: Bus) -> None:
    """Two nodes bid for a task, and the one that rates itself higher in its domain wins."""
    async with Runtime() as rt:
        rt.add_agent(str.upper, name="novice", capabilities={"text": 0.3})
        rt.add_agent(str.upper, name="expert", capabilities={"text": 0.9})
        handle = await rt.publish(TaskAd(domain="text", description="hello"))
        result, record = await handle.result(), await handle.record()

    assert result.node_id == "expert"
    assert record is not None
    assert record.envelope.award is not None
    assert [bid.node_id for bid in record.envelope.award.bids] == ["expert", "novice"]


async def test_a_reward_changes_which_node_wins(on_bus: tuple[str, str]) -> None:
    """Feedback of 0 lowers the score of a node until another node wins."""
    url, namespace = on_bus
    winners = []
    config = ClusterConfig(policy="greedy")  # without it MATCH also tries nodes that are little known
    async with running_phases(url, namespace=namespace, config=config), Runtime() as rt:
        rt.add_agent(str.upper, name="favourite", capabilities={"text": 0.9})
        rt.add_agent(str.upper, name="challenger", capabilities={"text": 0.8})
        while "challenger" not in winners:
            result = await (await rt.publish(TaskAd(domain="text", description="hello"))).result()
            await rt.feedback(result.task_id, 0.0)
            winners.append(result.node_id)

    assert winners[0] == "favourite"


async def test_a_node_that_fails_is_replaced(phases: Bus) -> None:
    """The attempt of a failing agent counts as failed, and the next attempt runs on another node."""

    def fail(description: str) -> str:
        raise RuntimeError("out of paper")

    async with Runtime() as rt:
        rt.add_agent(fail, name="broken", capabilities={"text": 0.9})
        rt.add_agent(str.upper, name="spare", capabilities={"text": 0.3})
        result = await (await rt.publish(TaskAd(domain="text", description="hello"))).result()

    assert (result.content, result.node_id, result.attempts) == ("HELLO", "spare", 2)
