"""A task's parts as a tree: complete, indented, and bounded in length."""

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from support.strategies import messages

from loom.bus.queries import FoundTask
from loom.runner.cli.views.subtask_tree import Division, tree
from loom.runner.cli.views.tables import ROWS, short
from loom.schemas.base import MAX_SECONDS
from loom.schemas.envelope import Claim, Envelope, Split
from loom.schemas.plan import SplitPlan, Subtask
from loom.schemas.record import TaskRecord
from loom.schemas.task import RunResult, TaskAd, TaskError

NOW = 1010.0


def drawn(division: Division, width: int = 100) -> list[str]:
    screen = Console(file=io.StringIO(), width=width)
    screen.print(tree(division, NOW))
    assert isinstance(screen.file, io.StringIO)
    return [line.rstrip() for line in screen.file.getvalue().splitlines()]


def envelope(task_id: str, **facts: Any) -> Envelope:
    return Envelope(ad=TaskAd(task_id=task_id, description=f"do {task_id}"), deadline=2000.0, **facts)


def plan(task_id: str, *parts: Subtask, **facts: Any) -> SplitPlan:
    return SplitPlan(parent_id=task_id, subtasks=parts, envelope=envelope(task_id), **facts)


def part(name: str, state: str = "waiting", *after: str, **facts: Any) -> Subtask:
    return Subtask(
        id=name,
        description=f"do {name}",
        state=state,  # type: ignore[arg-type]
        dependencies=after,
        child_id=f"c-{name}",
        **facts,
    )


def found(task_id: str, phase: str = "", state: Any = "running", node: str = "", **facts: Any) -> FoundTask:
    claim = Claim(attempt=1, node_id=node) if node else Claim()
    fields = {"envelope": envelope(task_id), **facts}
    return FoundTask(TaskRecord(task_id=task_id, state=state, claim=claim, admitted_at=1000.0, **fields), phase)


def test_a_running_plan_shows_running_nodes_and_waiting_dependencies() -> None:
    root = plan(
        "t",
        part("a", "succeeded", node_id="ann", tokens=120, grant=200, duration_s=1.25),
        part("b", "running", "a"),
        part("c", "waiting", "a", "b"),
    )

    assert drawn(Division("t", {"t": root}, {"c-b": found("c-b", "execute", node="bob")})) == [
        "1 of 3 subtasks done, 120 tokens",
        " subtask  state      node    time      tokens  after  what",
        " ├─ a     succeeded  ann   1.25 s  120 of 200         do a",
        " ├─ b     running    bob     10 s              a      (in execute) do b",
        " └─ c     waiting                              a, b   do c",
    ]


def test_a_part_that_was_divided_again_has_its_parts_below_it() -> None:
    inner = plan("c-a", part("x", "succeeded"), part("y", "running"))
    division = Division("t", {"t": plan("t", part("a", "running"), part("b", "running")), "c-a": inner})

    assert [line.split("  ")[0] for line in drawn(division)[2:]] == [" ├─ a", " │", " │", " └─ b"]
    assert "│  ├─ x" in drawn(division)[3]
    assert "(1 of 2 subtasks done) do a" in drawn(division)[2]


def test_a_failed_plan_shows_the_reason_and_the_subtasks_not_run() -> None:
    broken = part("a", "failed", error=TaskError(code="agent_failed", message="it raised"))
    root = plan("t", broken, part("b", "waiting", "a"), part("c", "running"), state="done")
    cancelled = found("c-c", state="cancelled", ended_at=1002.0)

    lines = drawn(Division("t", {"t": root}, {"c-c": cancelled}))

    assert "failed" in lines[2]
    assert "agent_failed: it raised" in lines[2]
    assert "not run" in lines[3]
    assert "cancelled" in lines[4]
    assert "2.00 s" in lines[4]


def test_delegated_tasks_of_a_run_are_listed_with_its_parts() -> None:
    child = "0123456789abcdef" * 2
    split = Split(parent="t", depth=1, grant=500, deadline=2000.0)
    done = envelope(child, split=split, result=RunResult(prompt_tokens=30, completion_tokens=12))
    division = Division(
        "t",
        {},
        {
            "t": FoundTask(found("t", delegated=(child, "unread")).record, ""),
            child: found(child, state="succeeded", envelope=done, ended_at=1003.0),
        },
    )

    lines = drawn(division)

    assert lines[0] == "1 delegated tasks, 42 tokens"
    assert lines[2].split() == [
        "└─",
        short(child),
        "succeeded",
        "3.00",
        "s",
        "42",
        "of",
        "500",
        "delegated:",
        "do",
        child,
    ]


def test_an_undivided_task_has_no_tree() -> None:
    assert tree(Division("t", {}, {"t": found("t")}), NOW).row_count == 0


def test_of_very_many_parts_the_first_are_shown() -> None:
    lines = drawn(Division("t", {"t": plan("t", *(part(f"p{n}") for n in range(1000)))}))

    assert len(lines) == ROWS + 3
    assert lines[-1].strip() == "… and 960 more"


@pytest.mark.slow
@settings(max_examples=20)
@given(st.lists(messages(Subtask), min_size=1, max_size=3), messages(TaskRecord))
def test_any_plan_can_be_drawn_at_any_width(parts: list[Subtask], record: TaskRecord) -> None:
    children = {one.child_id: FoundTask(record, "match") for one in parts if one.child_id}
    lines = drawn(Division("t", {"t": plan("t", *parts)}, children), 80)

    assert all(cell_len(line) <= 80 for line in lines)
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("code", ["\x1b[2J", "\x9b2J", "\x07", "\u202e"])
def test_no_part_of_a_plan_steers_the_terminal(code: str) -> None:
    evil = Subtask(id=code, description=code, dependencies=(code,), state="running", child_id="c", node_id=code)
    lines = drawn(Division("t", {"t": plan("t", evil)}))

    assert "�" in lines[-1]
    assert code[0] not in "".join(lines)


def test_a_task_that_took_longer_than_a_message_can_carry_is_drawn() -> None:
    child = found("c-a", state="succeeded", ended_at=5e10)
    lines = drawn(Division("t", {"t": plan("t", part("a", "running"))}, {"c-a": child}))

    assert child.record is not None
    assert child.record.lasted_s == MAX_SECONDS
    assert any("do a" in line for line in lines)
