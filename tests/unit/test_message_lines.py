"""The output of the command line: printable, on one line, and an answer only once."""

import asyncio
import json
import sys
import unicodedata
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from loom.bus.bus import Bus
from loom.bus.tap import SHAPES, TappedMessage
from loom.runner import log_output
from loom.runner.cli import app, entry
from loom.runner.cli.entry import run_to_end, unless_lost, until_lost
from loom.runner.cli.views.answer_stream import Transcript
from loom.runner.cli.views.message_lines import _FACTS, as_object, describe
from loom.runner.cli.views.tables import one_line, printable
from loom.schemas.auction import Award
from loom.schemas.envelope import Envelope, Split
from loom.schemas.errors import BusUnavailable, InvalidTask
from loom.schemas.notices import Notice, ParentEnded, PlanTimeout, SubtaskEnded
from loom.schemas.task import TaskAd


@given(st.text(), st.integers(min_value=1, max_value=50))
def test_one_line_is_within_its_length_and_has_no_control_characters(text: str, most: int) -> None:
    line = one_line(text, most)

    assert len(line) <= most
    assert not any(unicodedata.category(character).startswith("C") for character in line)


def test_line_breaks_and_tabs_are_printable_and_escapes_are_not() -> None:
    assert printable("a\tb\n\x1b[31mred\x07") == "a\tb\n�[31mred�"


@pytest.mark.parametrize(
    ("pieces", "content", "printed"),
    [
        ([(1, "good "), (1, "night")], "good night", "good night\n"),
        ([], "good night", "good night\n"),
        ([(1, "good ")], "good night", "good night\n"),  # the last piece was lost
        ([(1, "night")], "good night", "night\ngood night\n"),  # the first was
        (
            [(1, "let me see. "), (1, "good night\n")],
            "good night",
            "let me see. good night\n",
        ),  # written before the result
        ([(1, "good "), (2, "good day")], "good day", "good \ngood day\n"),  # another node started again
        ([(1, "a long story")], "a long", "a long story\n"),  # the result was cut
    ],
)
def test_an_answer_is_printed_once(
    pieces: list[tuple[int, str]], content: str, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    transcript = Transcript()
    for attempt, text in pieces:
        transcript.add(attempt, text)
    transcript.close(content)
    transcript.break_line()

    assert capsys.readouterr().out == printed


def test_every_kind_of_message_has_words() -> None:
    assert set(_FACTS) == {*SHAPES.values(), *get_args(Notice)}


@pytest.mark.parametrize(
    ("family", "headers", "expected"),
    [
        ("", {}, ("?", "loom.new.thing", "7 bytes")),
        ("result", {}, ("result", "t1", "7 bytes")),
        ("dead", {"Loom-Dead-reason": "not JSON"}, ("dead", "t1", "not JSON")),
    ],
)
def test_an_unreadable_message_is_still_described(
    family: str, headers: dict[str, str], expected: tuple[str, str, str]
) -> None:
    tokens = {"task_id": "t1"} if family else {}
    seen = TappedMessage(
        subject="loom.new.thing",
        family=family,
        tokens=tokens,
        message=b"\xff\x00 ?!..",
        headers=headers,
        at=0.0,
        size=7,
    )

    assert describe(seen) == expected
    assert as_object(seen)["raw"] == b"\xff\x00 ?!.."


CHILD = "vhbjcwllu7fwm5miyoy253m5ai"
AWARD = Award(node_id="bob", host_id="h")
PART = Split(parent="report", depth=1, subtask="end", deadline=60.0, inputs={"left": "l", "right": "r"})


@pytest.mark.parametrize(
    ("phase", "facts", "expected"),
    [
        ("sense", {"split": PART}, 'subtask end of report with left, right: "do it"'),
        ("sense", {"split": replace(PART, subtask=None, inputs={})}, 'delegated by report: "do it"'),
        (
            "execute",
            {"award": AWARD, "inputs": {"a": "1", "b": "2"}},
            "its subtasks are done: bob puts 2 outputs together",
        ),
        ("scale", {"award": AWARD}, "awarded to bob (0.00, 0 bids)"),
    ],
)
def test_each_step_of_a_division_is_described(phase: str, facts: dict[str, Any], expected: str) -> None:
    envelope = Envelope(ad=TaskAd(task_id="t1", description="do it"), deadline=60.0, **facts)
    tokens = {"task_id": "t1", "phase": phase}
    seen = TappedMessage(subject="", family="task", tokens=tokens, message=envelope, headers={}, at=10.0, size=1)

    assert describe(seen)[2] == expected


PARKED = PlanTimeout(envelope=Envelope(ad=TaskAd(task_id="t1", description="do it"), deadline=60.0))


@pytest.mark.parametrize(
    ("family", "notice", "expected"),
    [
        ("later", PARKED, "divided: parked for its subtasks, at most 50 s"),
        ("task", PARKED, "the deadline has passed before all of its subtasks had ended"),
        ("task", SubtaskEnded(task_id="t1", child_id=CHILD, subtask="end"), "subtask end has ended: vhbjcwll"),
        ("task", ParentEnded(task_id="t1"), "has ended, and so have its subtasks"),
    ],
)
def test_each_notice_about_a_division_is_described(family: str, notice: Notice, expected: str) -> None:
    tokens = {"task_id": "t1", "phase": "scale"} if family == "task" else {"task_id": "t1", "origin": "timer"}
    seen = TappedMessage(subject="", family=family, tokens=tokens, message=notice, headers={}, at=10.0, size=1)

    assert describe(seen)[2] == expected


async def test_work_ends_with_the_connection_it_needs() -> None:
    bus = Bus("nats://127.0.0.1:1")
    assert await unless_lost(bus, asyncio.sleep(0, "done")) == "done"

    stopped = asyncio.Event()

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    waiting = asyncio.ensure_future(unless_lost(bus, endless()))
    serving = asyncio.ensure_future(until_lost(bus))
    await asyncio.sleep(0)
    bus.tasks.lost.set()

    with pytest.raises(BusUnavailable, match="closed for good"):
        await waiting
    with pytest.raises(BusUnavailable, match="closed for good"):
        await serving
    assert stopped.is_set()


def test_the_failure_of_work_is_its_own() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_to_end(fail())


def test_uvloop_is_used_where_it_is_installed() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def running() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert isinstance(run_to_end(running()), uvloop.Loop)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_service_is_announced_by_a_line_on_a_terminal_and_by_a_log_event_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log_output.configure("info", readable=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)

    entry.report_ready("match on nats://127.0.0.1:4222")

    out, err = capsys.readouterr()
    if terminal:
        assert (out, err) == ("match on nats://127.0.0.1:4222\n", "")
    else:
        assert out == ""
        assert json.loads(err)["message"] == "match on nats://127.0.0.1:4222"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InvalidTask("I need a file", field="context.file"), "I need a file (field context.file)"),
        (InvalidTask("timeout_s must be a number", field="timeout_s"), "timeout_s must be a number"),
        (InvalidTask("no"), "no"),
    ],
)
def test_a_message_that_does_not_name_its_field_gets_it_behind(error: InvalidTask, line: str) -> None:
    assert app._with_field(error) == line
