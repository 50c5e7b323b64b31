"""The example of an MCP server's tools, as a node in a process and an environment of its own."""

import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.command import Command, alive, below, command
from support.environments import python_of, with_loom
from support.llamacpp_server import KEY, llamacpp_server, scripted_model, tool_call
from support.openai_server import OpenAIServer, Reply
from support.wait import until

from loom.bus import task_client
from loom.bus.bus import Bus
from loom.schemas.events import ToolCallEnd
from loom.schemas.task import TaskAd, TaskResult

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # the environments are made on first use

EXAMPLE = Path(__file__).parents[2] / "examples" / "mcp_tools.py"
SERVER = Path(__file__).parents[1] / "support" / "mcp_server.py"


@pytest.fixture(scope="session")
def python() -> Path:
    return python_of("mcp")


@pytest.fixture(scope="session")
def model_python() -> Path:
    return python_of("llamacpp")


@asynccontextmanager
async def hosting(on_bus: tuple[str, str], python: Path, base_url: str, folder: Path) -> AsyncIterator[Command]:
    """The example's node, with the model at `base_url`."""
    url, namespace = on_bus
    environment = {"NATS_URL": url, "LOOM_NAMESPACE": namespace, "MCP_SERVER": f"{python} {SERVER}"}
    environment |= {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": KEY}
    async with command(
        folder, *with_loom(python, "loom.runner.cli"), "host", "run", str(EXAMPLE), **environment
    ) as host:
        yield await host.wait_for_output("on nats://")


async def done(client: Bus) -> tuple[TaskResult, dict[str, ToolCallEnd]]:
    """The result of a task for the example's node, and how its calls ended, by tool."""
    ad = TaskAd(node_id="clerk", domain="files", description="[sum] What is 1 + 2?", timeout_s=30)
    handle = await task_client.publish(client, ad)
    events = [delta.event async for delta in handle.events()]
    return await handle.result(30), {each.name: each for each in events if isinstance(each, ToolCallEnd)}


def served(host: Command) -> list[int]:
    """Processes of the MCP server below a host."""
    return [pid for pid, words in below(host.process.pid).items() if SERVER.name in words]


async def test_a_model_calls_the_tools_of_an_mcp_server(
    phases: Bus, on_bus: tuple[str, str], client: Bus, model: OpenAIServer, python: Path, tmp_path: Path
) -> None:
    calls = (("add", '{"a": 1, "b": 2}'), ("add", '{"a": "one"}'), ("files_read", '{"path": "x"}'), ("picture", "{}"))
    model.script(Reply(tool_calls=calls), Reply(text="It is 3."))
    async with hosting(on_bus, python, model.base_url, tmp_path) as host:
        result, _ = await done(client)
        pids = served(host)
        ended = await host.end(signal.SIGTERM)

    assert (result.state, result.content) == ("succeeded", "It is 3."), result.error
    offered = {each["function"]["name"]: each["function"] for each in model.requests[0].body["tools"]}
    assert set(offered) == {"add", "files_read", "picture", "crash"}
    assert offered["add"]["description"] == "Add two numbers."
    assert offered["add"]["parameters"]["properties"]["a"]["type"] == "integer"
    seen = [message["content"] for message in model.requests[1].messages if message["role"] == "tool"]
    assert seen[0] == "3"
    assert "not valid" in seen[1]
    assert "there is no x" in seen[2]
    assert seen[3].startswith("[image: image/png")
    assert result.error is None
    assert (ended.code, "Traceback" in ended.err) == (0, False), ended.err
    assert len(pids) == 1
    await until(lambda: not any(alive(pid) for pid in pids), what="the MCP server has ended with its host")


async def test_an_mcp_server_that_has_died_is_started_again_for_the_next_call(
    phases: Bus, on_bus: tuple[str, str], client: Bus, model: OpenAIServer, python: Path, tmp_path: Path
) -> None:
    model.script(
        Reply(tool_calls=(("crash", "{}"),)), Reply(tool_calls=(("add", '{"a": 1, "b": 2}'),)), Reply(text="It is 3.")
    )
    async with hosting(on_bus, python, model.base_url, tmp_path):
        result, ends = await done(client)

    assert (result.state, result.content) == ("succeeded", "It is 3."), result.error
    assert (ends["crash"].failed, ends["add"].failed, ends["add"].result) == (True, False, "3")


async def test_a_llama_cpp_model_uses_an_mcp_server(
    phases: Bus, on_bus: tuple[str, str], client: Bus, python: Path, model_python: Path, tmp_path: Path
) -> None:
    chains = {"sum": tool_call("add", json.dumps({"a": 1, "b": 2})), "after_tools": ("It is", " 3.")}
    scripted = scripted_model(model_python, tmp_path / "scripted.gguf", chains)
    async with (
        llamacpp_server(model_python, scripted, tmp_path) as server,
        hosting(on_bus, python, server.base_url, tmp_path),
    ):
        result, ends = await done(client)

    assert (result.state, result.content) == ("succeeded", "It is 3."), result.error
    assert (ends["add"].result, ends["add"].failed) == ("3", False)
