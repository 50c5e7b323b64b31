import asyncio
from collections.abc import AsyncGenerator

import pytest
from support.logs import capture_logs
from support.openai_server import OpenAIServer, Reply

from loom import Agent, AgentConfig, EventBus, OpenAIProvider, tool
from loom.schemas.errors import AgentFailed
from loom.types import AgentEvent, Done, ErrorEvent, StepStart, TextDelta, ToolCallEnd, ToolCallStart

HELLO = TextDelta(text="hello")


async def test_a_handler_gets_the_events_of_its_type() -> None:
    bus, texts, everything = EventBus(), list[AgentEvent](), list[AgentEvent]()
    bus.on("text_delta", texts.append)
    bus.on_all(everything.append)
    for event in (StepStart(step=1), HELLO):
        await bus.emit(event)

    assert texts == [HELLO]
    assert everything == [StepStart(step=1), HELLO]


async def test_a_pattern_matches_types_and_a_colon_is_an_underscore() -> None:
    bus, seen = EventBus(), list[str]()
    bus.on_pattern("tool:*", lambda event: seen.append(event.type))
    for event in (ToolCallStart(tool_call_id="1", name="add"), HELLO, ToolCallEnd(tool_call_id="1")):
        await bus.emit(event)

    assert seen == ["tool_call_start", "tool_call_end"]


async def test_a_removed_handler_is_not_called() -> None:
    bus, seen = EventBus(), list[AgentEvent]()
    bus.on_pattern("tool:*", seen.append)
    bus.on("text_delta", seen.append)
    bus.off("tool:*", seen.append)
    bus.off("text_delta", print)
    await bus.emit(ToolCallEnd(tool_call_id="1"))
    await bus.emit(HELLO)

    assert seen == [HELLO]


async def test_events_of_a_child_reach_its_parent_and_not_the_other_way() -> None:
    parent, seen = EventBus(), list[str]()
    child = parent.create_child()
    parent.on_all(lambda _: seen.append("parent"))
    child.on_all(lambda _: seen.append("child"))
    await child.emit(HELLO)
    await parent.emit(HELLO)

    assert seen == ["child", "parent", "parent"]


async def test_async_handlers_get_events_in_order_and_block_nothing() -> None:
    bus, seen, may_go = EventBus(), list[str](), asyncio.Event()

    async def slow(event: TextDelta) -> None:
        await may_go.wait()
        seen.append(event.text)

    bus.on("text_delta", slow)
    for text in "abc":
        await bus.emit(TextDelta(text=text))
    assert seen == []

    may_go.set()
    await bus.settle()
    assert seen == ["a", "b", "c"]


async def test_a_handler_that_raises_ends_nothing() -> None:
    bus, seen = EventBus(), list[AgentEvent]()

    def broken(event: AgentEvent) -> None:
        raise RuntimeError("broken")

    async def broken_later(event: AgentEvent) -> None:
        raise RuntimeError("broken later")

    for handler in (broken, broken_later, seen.append):
        bus.on_all(handler)
    with capture_logs() as logs:
        await bus.emit(HELLO)
        await bus.settle()

    assert seen == [HELLO]
    assert [line["event"] for line in logs] == ["event_handler_raised"] * 2


async def test_an_error_that_ends_the_events_is_an_event_to_handlers() -> None:
    bus, seen = EventBus(), list[AgentEvent]()
    bus.on_all(seen.append)

    async def failing() -> AsyncGenerator[AgentEvent, None]:
        yield HELLO
        raise AgentFailed("the model broke off")

    with pytest.raises(AgentFailed):
        async for _ in bus.relay(failing()):
            pass

    assert seen == [HELLO, ErrorEvent(error="the model broke off", code="agent_failed")]


async def test_an_agent_passes_the_events_of_a_run_to_its_event_bus() -> None:
    @tool
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    shared, kinds, ends = EventBus(), list[str](), list[ToolCallEnd]()
    shared.on_all(lambda event: kinds.append(event.type))
    async with OpenAIServer() as server:
        server.script(Reply(tool_calls=(("add", '{"a": 2, "b": 3}'),)), Reply(text="Five.", usage=(30, 5)))
        provider = OpenAIProvider(AgentConfig(api_key="test", base_url=server.base_url))
        agent = Agent(provider, AgentConfig(), "adder", tools=[add], event_bus=shared)
        agent.on("tool_call_end", ends.append)
        result = await agent.run("2 + 3?")
        await provider.aclose()

    assert [end.result for end in ends] == ["5"]
    assert isinstance(ends[0].duration_ms, int)
    assert (kinds[0], kinds[-1]) == ("step_start", Done.type)
    assert (result.content, result.tokens_used) == ("Five.", result.usage.total_tokens)
    assert isinstance(result.duration_ms, int)
    assert (agent.name, len(agent.id)) == ("adder", 32)


async def test_an_agent_streams_a_text_and_ends_with_whole_milliseconds() -> None:
    async with OpenAIServer() as server:
        provider = OpenAIProvider(AgentConfig(api_key="test", base_url=server.base_url))
        *_, done = [event async for event in Agent(provider).stream("hello")]
        await provider.aclose()

    assert isinstance(done, Done)
    assert (done.content, type(done.duration_ms)) == ("You wrote: hello", int)
