"""A Runtime inside a user's program: the global state of the program stays unchanged."""

import asyncio
import logging
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from loom import Runtime, TaskAd
from loom.runner import log_output


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    log_output.reset()
    yield
    log_output.reset()


def globals_of_the_process() -> dict[str, Any]:
    """Return the state that a library could change for the whole process."""
    structure = structlog.get_config()
    return {
        "structlog": (structlog.is_configured(), {**structure, "processors": list(structure["processors"])}),
        "logging": (list(logging.root.handlers), logging.root.level, logging.getLogger("loom").handlers),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "hooks": (sys.excepthook, sys.unraisablehook, sys.displayhook),
        "loop": (type(asyncio.get_running_loop()), asyncio.get_running_loop().get_exception_handler()),
    }


@pytest.mark.parametrize("level", ["", "debug"])
async def test_a_runtime_does_not_change_global_state_of_its_program(
    level: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    monkeypatch.setenv("LOOM_LOG_LEVEL", level)
    mine = structlog.get_logger()  # noqa: TID251 - the program's own
    before = globals_of_the_process()

    async def agent(_description: str) -> str:
        mine.info("logged by the agent")
        return "ok"

    runtime = Runtime()
    runtime.add_agent(agent, name="a")
    async with runtime:
        assert globals_of_the_process() == before
        assert await runtime.submit(TaskAd(description="x")) == "ok"
        mine.info("logged meanwhile")
    mine.info("logged afterwards")

    assert globals_of_the_process() == before
    output = capsys.readouterr()
    assert all(f"logged {when}" in output.out for when in ("by the agent", "meanwhile", "afterwards"))
    assert ("phases_started" in output.err) is (level == "debug")


async def test_a_program_that_logs_by_the_standard_library_gets_the_lines_of_loom(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NATS_URL", raising=False)
    with caplog.at_level(logging.INFO):
        async with Runtime():
            pass

    assert any(name == "loom" and "phases_started" in text for name, _, text in caplog.record_tuples)
