"""The example of a langgraph graph, as a node in a process and an environment of its own."""

import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.command import Command, command
from support.environments import python_of, with_loom
from support.nodes import node
from support.openai_server import OpenAIServer, Reply
from support.wait import until

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.runner.services import running_nodes
from loom.schemas.events import TextDelta
from loom.schemas.run import RunRequest
from loom.schemas.task import TaskAd

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # the environment is made on first use

EXAMPLE = Path(__file__).parents[2] / "examples" / "langgraph_node.py"
STORY = "Ada wrote the first program, long before there was a machine."


async def facts(job: RunRequest) -> str:
    return "Ada lived from 1815 to 1852."


async def no_facts(job: RunRequest) -> str:
    raise RuntimeError("the archive is closed")


@pytest.fixture(scope="session")
def python() -> Path:
    return python_of("langgraph")


@pytest.fixture
async def hosting(
    phases: Bus, on_bus: tuple[str, str], python: Path, model: OpenAIServer, tmp_path: Path
) -> AsyncIterator[Command]:
    url, namespace = on_bus
    environment = {"NATS_URL": url, "LOOM_NAMESPACE": namespace}
    environment |= {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "test", "LANGSMITH_TRACING": "false"}
    async with command(
        tmp_path, *with_loom(python, "loom.runner.cli"), "host", "run", str(EXAMPLE), **environment
    ) as host:
        yield await host.wait_for_output("on nats://")


@asynccontextmanager
async def fact_finder(on_bus: tuple[str, str], agent: object = facts) -> AsyncIterator[None]:
    url, namespace = on_bus
    async with running_nodes(url, lambda: [node("finder", agent, facts=0.9)], namespace=namespace):  # type: ignore[arg-type]
        yield


def story(**more: object) -> TaskAd:
    return TaskAd(node_id="writer", domain="writing", description="Who was Ada?", timeout_s=30, **more)  # type: ignore[arg-type]


async def test_a_graph_streams_its_answer_and_reports_its_tokens(
    on_bus: tuple[str, str], client: Bus, hosting: Command, model: OpenAIServer
) -> None:
    model.script(Reply(text=STORY, usage=(21, 13)))
    context = {"conversation": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    async with fact_finder(on_bus):
        handle = await task_client.publish(client, story(context=context))
        texts = [delta.event.text async for delta in handle.events() if isinstance(delta.event, TextDelta)]
        result = await handle.result(30)

    assert (result.state, result.content, result.node_id) == ("succeeded", STORY, "writer"), result.error
    assert ("".join(texts), len(texts) > 2) == (STORY, True)
    assert (result.prompt_tokens, result.completion_tokens) == (21, 13)
    asked = [(message["role"], message["content"]) for message in model.requests[0].messages]
    assert asked == [
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", "Who was Ada?"),
        ("system", "Facts:\nAda lived from 1815 to 1852."),
    ]


async def test_a_graph_ends_with_the_token_budget_of_its_task(
    on_bus: tuple[str, str], client: Bus, hosting: Command, model: OpenAIServer
) -> None:
    model.script(Reply(text=STORY, usage=(21, 13)))
    async with fact_finder(on_bus):
        result = await (await task_client.publish(client, story(token_budget=30))).result(30)

    assert result.error is not None
    assert result.error.code == "budget_exceeded"
    assert (result.prompt_tokens, result.completion_tokens) == (21, 13)


async def test_a_graph_that_fails_fails_its_task_and_the_text_of_an_exception_stays_in_the_log(
    on_bus: tuple[str, str], client: Bus, hosting: Command, model: OpenAIServer
) -> None:
    model.answer = lambda _: Reply(status=400, body='{"error": {"message": "the model is out of order"}}')
    async with fact_finder(on_bus):
        raised = await (await task_client.publish(client, story())).result(30)
    async with fact_finder(on_bus, no_facts):
        undelegated = await (await task_client.publish(client, story())).result(30)

    assert raised.error is not None
    assert raised.error.code == "agent_failed"
    assert re.fullmatch(r"the agent raised \w*RequestError", raised.error.message)
    await hosting.wait_for_output("the model is out of order")
    assert undelegated.error is not None
    assert undelegated.error.code == "subtask_failed"


async def test_cancelling_ends_the_graphs_model_request_and_its_host_continues(
    on_bus: tuple[str, str], client: Bus, hosting: Command, model: OpenAIServer
) -> None:
    model.script(Reply(text=STORY, silent_after=3))
    async with fact_finder(on_bus):
        handle = await task_client.publish(client, story())
        async for delta in handle.events():
            if isinstance(delta.event, TextDelta):
                await handle.cancel()
                break
        await until(lambda: model.disconnects, what="the graph's client hangs up")
        again = await (await task_client.publish(client, story())).result(30)
    ended = await hosting.end(signal.SIGTERM)

    assert ((await handle.result(5)).state, again.state) == ("cancelled", "succeeded"), again.error
    assert (ended.code, "Traceback" in ended.err) == (0, False), ended.err
