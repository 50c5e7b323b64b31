"""The examples for scripts, web frameworks and notebooks, run by the commands in their first lines."""

import asyncio
import http.client
import json
import os
import socket
import sys
import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from support.command import command
from support.environments import python_of, with_loom
from support.wait import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # the first run installs what the examples need

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK_RUNNER = Path(__file__).parents[1] / "data" / "run_notebook.py"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class Client:
    """Sends HTTP requests with JSON to a local server."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Return status and decoded body of the answer."""
        return await asyncio.to_thread(self._post, path, json.dumps(body))

    def _post(self, path: str, body: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        with closing(connection):
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())


@asynccontextmanager
async def served(folder: Path, *words: str) -> AsyncIterator[Client]:
    """A web service that takes connections."""
    port = free_port()
    async with command(folder, *words, "--port", str(port)):

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        await until(answers, within_s=30, what="the web service takes connections")
        yield Client(port)


async def test_a_script_without_an_event_loop_prints_its_answers(tmp_path: Path) -> None:
    async with command(tmp_path, sys.executable, str(EXAMPLES / "script.py")) as script:
        ended = await script.end()
    assert (ended.code, ended.out) == (0, "5 words\n2 words\n"), ended.err


async def test_fastapi_opens_a_runtime_with_the_app(tmp_path: Path) -> None:
    uvicorn = with_loom(python_of("web"), "uvicorn")
    async with served(tmp_path, *uvicorn, "--app-dir", str(EXAMPLES / "web"), "fastapi_app:app") as client:
        done = await client.post("/tasks", {"description": "how many words are these"})
        refused = await client.post("/tasks", {"description": "x", "timeout_s": -1})

    assert done == (200, {"answer": "5 words"})
    assert (refused[0], refused[1]["detail"]["field"]) == (422, "timeout_s")


async def test_views_of_flask_wait_for_their_answers(tmp_path: Path) -> None:
    flask = with_loom(python_of("web"), "flask")
    async with served(tmp_path, *flask, "--app", str(EXAMPLES / "web" / "flask_app.py"), "run") as client:
        one, two = [await client.post("/tasks", {"description": "word " * count}) for count in (1, 2)]
        refused = await client.post("/tasks", {"description": " "})

    assert (one, two) == ((200, {"answer": "1 words"}), (200, {"answer": "2 words"}))
    assert (refused[0], refused[1]["field"]) == (422, "description")


async def test_a_notebook_runs_its_cells_twice(tmp_path: Path) -> None:
    packages = os.pathsep.join([str(EXAMPLES.parent), sysconfig.get_path("purelib")])  # the kernel imports loom, too
    words = (str(python_of("notebook")), str(NOTEBOOK_RUNNER), str(EXAMPLES / "notebook.ipynb"))
    async with command(tmp_path, *words, PYTHONPATH=packages, HOME=str(tmp_path)) as run:
        ended = await run.end()
    assert ended.code == 0, ended.err
    assert "'5 words'" in ended.out
    assert "('counter', 'unproven')" in ended.out
