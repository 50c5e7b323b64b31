"""The state of the process is the same at the beginning of every test, in any order of tests."""

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

import pytest
import structlog
from support.logs import capture_logs
from support.process_state import process_state_restored

from loom.bus.logs import logger as logger_module
from loom.runner import log_output


class Policy(asyncio.DefaultEventLoopPolicy):
    """A policy that no test uses."""


def state() -> dict[str, object]:
    """Return the state that tests may change."""
    root, ours = logging.getLogger(), logging.getLogger("loom")
    return {
        "structlog is configured": structlog.is_configured(),
        "loom's output is the library's": logger_module.is_default(),
        "structlog's facts": structlog.contextvars.get_contextvars(),
        "levels": (root.level, ours.level, logging.root.manager.disable),
        "switches": (ours.propagate, ours.disabled),
        "handlers": [type(handler).__name__ for handler in (*root.handlers, *ours.handlers)],
        "environment": {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        "folder": Path.cwd(),
        "import path": [*sys.path],
        "event loop policy": type(asyncio.get_event_loop_policy()),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)],
        "signal mask": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
    }


def change_everything(folder: Path) -> None:
    wrapper = structlog.make_filtering_bound_logger(logging.CRITICAL)
    structlog.configure(wrapper_class=wrapper)  # noqa: TID251 - as a program does
    log_output.configure("error")
    structlog.contextvars.bind_contextvars(task_id="left over")
    for logger in (logging.getLogger(), logging.getLogger("loom")):
        logger.setLevel(logging.CRITICAL)
        logger.addHandler(logging.FileHandler(os.devnull, delay=True))
    logging.disable(logging.ERROR)
    logging.getLogger("loom").propagate = False
    os.environ["LOOM_NAMESPACE"] = "left-over"
    os.environ.pop("PATH")
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    asyncio.set_event_loop_policy(Policy())
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])


@pytest.fixture(scope="module")
def first_seen() -> dict[str, object]:
    """The state that the first test of this module finds; pytest's handlers of the moment are its own."""
    return {}


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="an event loop policy is deprecated")
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_a_test_that_changes_everything_changes_nothing_for_the_next(
    turn: int, first_seen: dict[str, object], tmp_path: Path
) -> None:
    found = state()
    assert found == (first_seen or found)
    assert not structlog.is_configured()
    assert "LOOM_NAMESPACE" not in os.environ
    first_seen.update(found)

    change_everything(tmp_path)

    changed = state()
    assert {name for name in found if found[name] == changed[name]} == set()


def test_an_info_line_is_seen_after_logs_were_limited_to_warnings() -> None:
    with process_state_restored():
        log_output.configure("warning")

    with capture_logs() as lines:
        logger_module.get_logger().info("late_run_refused")

    assert [line["event"] for line in lines] == ["late_run_refused"]


def test_the_state_is_restored_when_the_body_fails(tmp_path: Path) -> None:
    before = state()

    def fail() -> None:
        with process_state_restored():
            change_everything(tmp_path)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert state() == before
