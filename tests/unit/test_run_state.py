"""The progress of the tasks of `loom run`, from messages that may be late, lost, or of other submitters."""

from io import StringIO
from typing import Any

from rich.console import Console
from support.builders import call_for_bids

from loom.bus.subjects import Subjects
from loom.bus.tap import TappedMessage
from loom.runner.cli.views.run_progress import Progress, line, live_table
from loom.runner.cli.views.run_state import RunState
from loom.schemas.auction import Award
from loom.schemas.envelope import Envelope, Spec, Split
from loom.schemas.events import TextDelta
from loom.schemas.learning.lifecycle import Lifecycle
from loom.schemas.learning.profile import NodeProfile
from loom.schemas.learning.reward import Reward
from loom.schemas.notices import ParentEnded, SubtaskEnded
from loom.schemas.run import Delta
from loom.schemas.task import Submission, TaskAd, TaskResult

SUBJECTS = Subjects()


def seen(message: Any, family: str, *tokens: str) -> TappedMessage:
    subject = SUBJECTS.of(family, *tokens)
    parsed = SUBJECTS.parse(subject)
    assert parsed is not None
    return TappedMessage(
        subject=subject, family=family, tokens=parsed.tokens, message=message, headers={}, at=0.0, size=0, skipped=0
    )


def board(*names: str) -> RunState:
    return RunState([TaskAd(task_id=name, description="x") for name in names])


def hop(phase: str, name: str = "one", *, attempt: int = 1, node: str = "") -> TappedMessage:
    award = Award(node_id=node, host_id="h") if node else None
    spec = Spec(complexity=0.1, domains=("代码",), method="given")
    ad = TaskAd(task_id=name, description="x")
    return seen(Envelope(ad=ad, spec=spec, award=award, attempt=attempt, deadline=9.0), "task", phase, "normal", name)


def reward(name: str, node: str) -> TappedMessage:
    message = Reward(
        reward_id=f"{name}:1:rules", task_id=name, attempt=1, node_id=node, domain_token="code", score=1.0, ended_at=1.0
    )
    return seen(message, "reward", "rules", "local", node, "code")


def learned(node: str, *names: str) -> TappedMessage:
    profile = NodeProfile(node_id=node, total_tasks=len(names))
    news = Lifecycle(kind="learned", node_id=node, at=1.0, task_ids=names, profile=profile)
    return seen(news, "lifecycle", "adapt", "learned", "local", node)


def result(name: str, node: str = "coder") -> TaskResult:
    return TaskResult(task_id=name, state="succeeded", content="x", node_id=node, attempts=1)


def test_nodes_with_the_same_name_are_distinguished_by_owner() -> None:
    state = board("one")
    award = Award(node_id="coder", owner="acme", host_id="h")
    moved = Envelope(ad=state.rows["one"].ad, award=award, deadline=9.0)
    state.see(seen(moved, "task", "execute", "normal", "one"))
    assert state.rows["one"].node == "acme.coder"
    state.end(TaskResult(task_id="one", state="succeeded", node_id="coder", owner="acme", attempts=1))
    state.see(learned("coder", "one"))
    assert not state.learned, "that was the node of another owner"
    profile = NodeProfile(node_id="coder", owner="acme")
    news = Lifecycle(kind="learned", node_id="coder", owner="acme", at=1.0, task_ids=("one",), profile=profile)
    state.see(seen(news, "lifecycle", "adapt", "learned", "acme", "coder"))
    assert state.learned
    assert set(state.profiles) == {"coder", "acme.coder"}


def test_a_task_is_followed_through_its_phases() -> None:
    state = board("one")
    ad = state.rows["one"].ad
    call = call_for_bids(task_id="one")

    lines = [line(state.rows["one"])]
    for message in (
        seen(Submission(ad=ad, submission="s"), "intake", "public", "normal", "one"),
        seen(call, "auction", "code"),
        hop("match"),
        hop("execute", node="coder"),
        hop("match", attempt=2),
        hop("execute", node="other", attempt=2),
        seen(result("one", "other"), "result", "public", "one"),
    ):
        row = state.see(message)
        if row is not None:
            lines.append(line(row))

    assert lines == [
        "one  waiting",
        "one  sense",
        "one  match",
        "one  execute  on coder",
        "one  match  attempt 2",
        "one  execute  on other  attempt 2",
        "one  succeeded  on other",
    ]
    assert {key: award.node_id for key, award in state.awards.items()} == {("one", 1): "coder", ("one", 2): "other"}


def test_late_messages_and_foreign_tasks_change_nothing() -> None:
    state = board("one", "two")
    state.see(hop("execute", node="coder", attempt=2))
    state.see(hop("execute", name="two", node="coder"))
    state.end(result("two"))

    assert state.see(hop("evaluate", attempt=1, node="slow")) is None
    assert state.see(hop("evaluate", name="two", node="coder")) is None
    assert state.see(hop("match", name="three")) is None
    assert state.see(reward("three", "coder")) is None
    assert state.end(result("two")) is None
    assert (state.rows["one"].phase, state.rows["one"].node) == ("execute", "coder")
    assert state.rows["two"].phase == "succeeded"
    assert state.rewards == {}


def test_the_text_of_a_node_is_shown_until_the_next_attempt() -> None:
    state = board("one")
    state.see(hop("execute", node="coder"))
    for n, text in enumerate(("good ", "night")):
        delta = Delta(task_id="one", attempt=1, seq=n, event=TextDelta(text=text))
        assert state.see(seen(delta, "delta", "public", "one")) is None
    assert state.rows["one"].tail == "good night"

    state.see(hop("match", attempt=2))

    assert state.rows["one"].tail == ""


def test_all_is_learned_once_every_reward_is_in_its_nodes_profile() -> None:
    state = board("one", "two")
    assert state.learned

    state.end(result("one", "coder"))  # its reward may arrive later, or never
    assert not state.learned
    state.see(reward("two", "writer"))
    state.see(learned("coder", "one", "foreign"))
    assert not state.learned
    state.see(learned("writer", "two"))
    assert state.learned

    state.see(learned("stranger", "foreign"))
    assert set(state.profiles) == {"coder", "writer"}


def test_a_table_too_high_shows_the_running_tasks() -> None:
    state = board(*(f"t{number}" for number in range(9)))
    state.end(result("t0"))
    state.see(hop("execute", name="t8", node="coder"))

    table = live_table(state, 3)

    assert table.row_count == 3
    assert next(iter(table.columns[0].cells)) == "t8"
    assert table.caption == "1 of 9 done"


def test_a_terminal_gets_a_table_and_a_pipe_gets_lines() -> None:
    shown = []
    for terminal in (True, False):
        state = board("one")
        screen = Console(file=StringIO(), force_terminal=terminal, width=80, height=20, highlight=False)
        with Progress(state, screen) as progress:
            progress.changed(state.see(hop("execute", node="coder")))
        assert isinstance(screen.file, StringIO)
        shown.append(screen.file.getvalue())

    table, lines = shown
    assert "0 of 1 done" in table
    assert "execute" in table
    assert lines == "one  execute  on coder\n"


def part(name: str, *, of: str, ended: bool = False) -> TappedMessage:
    if ended:
        return seen(SubtaskEnded(task_id=of, child_id=name, subtask="a"), "task", "scale", "normal", of)
    split = Split(parent=of, depth=1, subtask="a", deadline=9.0)
    message = Envelope(ad=TaskAd(task_id=name, description="x"), deadline=9.0, split=split)
    return seen(message, "task", "sense", "normal", name)


def test_a_divided_task_shows_how_far_its_parts_are() -> None:
    state = board("one")
    row = state.rows["one"]
    state.see(hop("scale", node="coder"))
    lines = [
        line(row)
        for message in (part("c1", of="one"), part("c2", of="one"), part("c3", of="two"))
        if state.see(message)
    ]
    assert state.see(part("c1", of="one", ended=True)) is row
    assert state.see(part("c1", of="one", ended=True)) is None  # received twice

    assert lines == [
        "one  scale  on coder  0 of 1 begun subtasks done",
        "one  scale  on coder  0 of 2 begun subtasks done",
    ]
    assert line(row) == "one  scale  on coder  1 of 2 begun subtasks done"
    assert list(state.domains.values()) == ["代码"]
    state.see(hop("execute", node="coder"))
    assert line(row) == "one  execute  on coder"
    state.see(seen(ParentEnded(task_id="one"), "task", "scale", "normal", "one"))
    assert line(row) == "one  execute  on coder"
