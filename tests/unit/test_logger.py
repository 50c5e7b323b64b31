"""Loom's log lines: their destination, and the untouched logging of other code."""

import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest
import structlog
from support.logs import capture_logs

from loom.bus.logs.logger import get_logger, is_default
from loom.runner import log_output


@pytest.fixture(autouse=True)
def _default() -> Iterator[None]:
    log_output.reset()
    yield
    log_output.reset()


def test_lines_go_to_the_logger_of_the_standard_library(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="loom"):
        get_logger().info("phases_started", phases=["sense"], share="50%")
        get_logger().debug("not_wanted")

    assert caplog.record_tuples == [("loom", logging.INFO, "phases_started phases=['sense'] share='50%'")]


def test_a_program_without_logging_prints_warnings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    handlers, logging.root.handlers = logging.root.handlers, []
    try:
        get_logger().info("bus_reconnected")
        get_logger().warning("bus_disconnected")
    finally:
        logging.root.handlers = handlers

    assert capsys.readouterr() == ("", "bus_disconnected\n")


def test_a_configured_level_rules_and_each_line_is_json_on_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    log_output.configure("warning", readable=False)
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())  # the stream of the moment, not of the configuration
    get_logger().info("not_wanted")
    get_logger().warning("bus_disconnected", server="a")

    line = json.loads(stderr.getvalue())
    assert (line["event"], line["level"], line["server"]) == ("bus_disconnected", "warning", "a")
    assert not is_default()


def test_configuring_and_resetting_leave_structlog_and_logging_as_they_are() -> None:
    before = structlog.get_config(), list(logging.root.handlers), logging.root.level, logging.getLogger("loom").level
    for readable in (True, False):
        log_output.configure("debug", readable=readable)
        log_output.reset()

    assert not structlog.is_configured()
    assert before == (
        structlog.get_config(),
        list(logging.root.handlers),
        logging.root.level,
        logging.getLogger("loom").level,
    )
    assert is_default()


def test_captured_lines_are_facts_and_the_output_before_is_back_afterwards() -> None:
    with capture_logs() as lines:
        get_logger().debug("bus_error", error="x")

    assert lines == [{"event": "bus_error", "error": "x", "log_level": "debug"}]
    assert is_default()


def test_a_process_without_standard_error_logs_nothing_and_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    log_output.configure("info")
    get_logger().error("bus_closed")
