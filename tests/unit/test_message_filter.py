"""The messages shown by a tap, and their text."""

import io
import re
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from support.auctions import nodes
from support.strategies import messages

from loom.bus.subjects import FAMILIES, Subjects
from loom.bus.tap import SHAPES, TappedMessage
from loom.runner.cli.common import domain_slug, seconds, span, sparkline
from loom.runner.cli.views import message_filter as sieve_module
from loom.runner.cli.views.message_filter import MessageFilter, phase_of
from loom.runner.cli.views.message_lines import MessageLines
from loom.schemas.auction import Award, HostAnnouncement
from loom.schemas.envelope import PHASES, Envelope, Spec, Split
from loom.schemas.events import TextDelta
from loom.schemas.learning.lifecycle import Lifecycle
from loom.schemas.learning.reward import Reward
from loom.schemas.run import Delta, RunRequest
from loom.schemas.task import TaskAd, TaskResult

SUBJECTS = Subjects()


def seen(message: Any, family: str, *tokens: str, skipped: int = 0) -> TappedMessage:
    parsed = SUBJECTS.parse(SUBJECTS.of(family, *tokens))
    assert parsed is not None
    return TappedMessage(
        subject=SUBJECTS.of(family, *tokens),
        family=family,
        tokens=parsed.tokens,
        message=message,
        headers={},
        at=0.0,
        size=1,
        skipped=skipped,
    )


def hop(task_id: str, phase: str = "execute", *, node: str = "", domain: str = "code") -> TappedMessage:
    award = Award(node_id=node, host_id="h") if node else None
    spec = Spec(complexity=0.5, domains=(domain,), method="given")
    ad = TaskAd(task_id=task_id, description="x")
    return seen(Envelope(ad=ad, spec=spec, award=award, deadline=1.0), "task", phase, "normal", task_id)


def delta(task_id: str) -> TappedMessage:
    return seen(Delta(task_id=task_id, attempt=1, seq=0, event=TextDelta(text="x")), "delta", "public", task_id)


def result(task_id: str, node_id: str | None = None) -> TappedMessage:
    return seen(TaskResult(task_id=task_id, state="failed", node_id=node_id), "result", "public", task_id)


def part(task_id: str, *, of: str) -> TappedMessage:
    split = Split(parent=of, depth=1, subtask="a", deadline=1.0)
    message = Envelope(ad=TaskAd(task_id=task_id, description="x"), deadline=1.0, split=split)
    return seen(message, "task", "sense", "normal", task_id)


def learned(node_id: str, *task_ids: str) -> TappedMessage:
    return seen(
        Lifecycle(kind="learned", node_id=node_id, at=0.0, task_ids=task_ids),
        "lifecycle",
        "adapt",
        "learned",
        "local",
        node_id,
    )


REWARD = seen(
    Reward(reward_id="r", task_id="t1", attempt=1, node_id="n1", domain_token="code", score=1.0, ended_at=0.0),
    "reward",
    "rules",
    "local",
    "n1",
    "code",
)
RUN = seen(RunRequest(task_id="t1", node_id="n1", description="x", domain="code"), "run", "local", "h")


def through(sieve: MessageFilter, *traffic: TappedMessage) -> list[int]:
    """Return the indexes of the messages that pass."""
    return [index for index, message in enumerate(traffic) if sieve.passes(message)]


def test_a_filter_without_criteria_passes_every_message() -> None:
    assert through(MessageFilter(), hop("t1"), delta("t2"), REWARD, learned("n1")) == [0, 1, 2, 3]


def test_a_task_is_known_by_its_id_or_its_first_digits() -> None:
    whole = "0123456789abcdef" * 2
    traffic = (hop(whole), delta(whole), hop("01234567x"), learned("n1", "other", whole), RUN, result(whole))

    assert through(MessageFilter(task=whole), *traffic) == [0, 1, 3, 5]
    assert through(MessageFilter(task=whole[:8]), *traffic) == [0, 1, 3, 5]
    assert through(MessageFilter(task="t1"), *traffic, REWARD) == [4, 6]


def test_a_task_comes_with_its_parts_and_theirs() -> None:
    traffic = (
        part("c1", of="t1"),
        delta("c1"),
        part("c2", of="other"),
        result("c2"),
        part("c11", of="c1"),
        result("c11"),
        learned("n1", "c11"),
    )

    assert through(MessageFilter(task="t1"), *traffic) == [0, 1, 4, 5, 6]
    assert through(MessageFilter(task="c1"), *traffic) == [0, 1, 4, 5, 6]
    assert through(MessageFilter(task="c11"), *traffic) == [4, 5, 6]


def test_a_subtask_ended_before_the_tap_belongs_to_its_task() -> None:
    sieve = MessageFilter(task="t1")
    sieve.remember_subtask(part("c1", of="t1").message)

    assert through(sieve, result("c1"), result("c2")) == [0]


def test_a_phase_matches_its_received_and_its_sent_messages() -> None:
    traffic = (hop("t1", "match"), hop("t1", "execute"), RUN, delta("t1"), result("t1"), REWARD, learned("n1", "t1"))

    assert through(MessageFilter(phase="match"), *traffic) == [0]
    assert through(MessageFilter(phase="execute"), *traffic) == [1, 2, 3]
    assert through(MessageFilter(phase="evaluate"), *traffic) == [4, 5]
    assert through(MessageFilter(phase="adapt"), *traffic) == [6]


def test_every_family_that_concerns_one_phase_has_it() -> None:
    of_hosts = {"host", "hosts", "lifecycle", "later"}
    for family in FAMILIES:
        tokens = ["match" if token == "phase" else "x" for token in family.tokens]
        if family.name not in of_hosts:
            assert phase_of(seen(b"", family.name, *tokens)) in PHASES, family.name


def test_deltas_follow_the_node_that_has_the_task() -> None:
    here = seen(HostAnnouncement(nodes=nodes("n1", "n2")), "host", "local", "h")
    traffic = (
        delta("t1"),  # its node is not known yet
        hop("t1", node="n1"),
        delta("t1"),
        delta("t2"),
        hop("t1", node="n2"),  # sent back, and awarded to another
        delta("t1"),
        result("t1"),
        REWARD,
        here,
        learned("n2", "t1"),
    )

    assert through(MessageFilter(node="n1"), *traffic) == [1, 2, 7, 8]
    assert through(MessageFilter(node="n2"), *traffic) == [4, 5, 6, 8, 9]


def test_a_domain_is_known_by_its_words_and_by_its_token() -> None:
    chinese = domain_slug("代码")
    traffic = (hop("t1", domain="代码"), delta("t1"), hop("t2"), delta("t2"), REWARD)

    assert chinese is not None
    assert through(MessageFilter(domain_token=chinese), *traffic) == [0, 1]
    assert domain_slug(chinese) == chinese
    assert through(MessageFilter(domain_token="code"), *traffic) == [2, 3, 4]
    assert domain_slug("") is None


def test_wishes_combine() -> None:
    traffic = (hop("t1", "execute", node="n1"), hop("t1", "evaluate", node="n1"), hop("t2", "execute", node="n1"))

    assert through(MessageFilter(task="t1", phase="execute", node="n1", domain_token="code"), *traffic) == [0]


def test_the_number_of_remembered_tasks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sieve_module, "REMEMBERED", 2)
    sieve = MessageFilter(node="n1")
    traffic = [hop(f"t{number}", node="n1") for number in range(3)]

    assert through(sieve, *traffic, *(delta(f"t{number}") for number in range(3))) == [0, 1, 2, 4, 5]


@given(st.sampled_from(sorted(SHAPES)).flatmap(lambda family: st.tuples(st.just(family), messages(SHAPES[family]))))
def test_any_message_can_be_filtered(sample: tuple[str, Any]) -> None:
    family, message = sample
    names = next(each.tokens for each in FAMILIES if each.name == family)

    MessageFilter(task="t", phase="match", node="n", domain_token="s").passes(
        seen(message, family, *("x" for _ in names))
    )


# -- lines


def screen(*, terminal: bool, width: int = 40, no_color: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, no_color=no_color)


def test_a_line_on_a_terminal_fits_and_is_coloured_unless_that_is_not_wanted() -> None:
    long = seen(TaskResult(task_id="t1", state="succeeded", content="代码 " * 40), "result", "public", "t1", skipped=3)

    coloured = MessageLines(screen(terminal=True))(long)
    plain = MessageLines(screen(terminal=True, no_color=True))(long)
    piped = MessageLines(screen(terminal=False))(long)

    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain
    assert "\x1b[33m3 skipped" in coloured
    assert max(cell_len(line) for line in plain.splitlines()) <= 40
    assert "\x1b" not in piped
    assert len(piped) > 80
    assert piped.count("\n") == 2


# -- small words


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("1d", 86_400)])
def test_a_time_is_written_with_its_unit(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["10", "m", "-1s", "1 h", "1w", "", "9999999999s"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="write it like 90s"):
        seconds(text)


@pytest.mark.parametrize(
    ("duration_s", "expected"),
    [(0.0004, "0.4 ms"), (0.085, "85 ms"), (1.254, "1.25 s"), (63.2, "63 s"), (720, "12 min")],
)
def test_durations_have_a_few_figures(duration_s: float, expected: str) -> None:
    assert span(duration_s) == expected


@given(st.lists(st.floats(min_value=0, max_value=1)))
def test_a_sparkline_has_a_bar_per_score_and_higher_ones_for_better(scores: list[float]) -> None:
    line = sparkline(scores)

    assert len(line) == len(scores)
    assert list(sparkline(sorted(scores))) == sorted(line)
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"


def test_a_node_is_selected_with_its_owner() -> None:
    announced = seen(HostAnnouncement(nodes=nodes("coder")), "host", "acme", "h1")
    award = Award(node_id="coder", owner="acme", host_id="h1")
    ad = TaskAd(task_id="t1", description="x")
    awarded = seen(Envelope(ad=ad, award=award, deadline=1.0), "task", "execute", "normal", "t1")
    reward = Reward(
        reward_id="t1:1:rules", task_id="t1", attempt=1, node_id="coder", owner="acme", domain_token="code",
        score=1.0, ended_at=1.0,
    )  # fmt: skip
    rewarded = seen(reward, "reward", "rules", "acme", "coder", "code")
    ended = seen(TaskResult(task_id="t1", state="succeeded", node_id="coder", owner="acme"), "result", "public", "t1")
    every = [announced, awarded, rewarded, ended]
    assert all(MessageFilter(node="acme.coder").passes(one) for one in every)
    assert not any(MessageFilter(node="coder").passes(one) for one in every)
    assert "acme.coder" in MessageLines(Console(file=io.StringIO()))(rewarded)


def test_heartbeats_and_probes_pass_only_where_routine_messages_are_wanted() -> None:
    traffic = (
        seen(HostAnnouncement(nodes=nodes("n1")), "host", "local", "h"),
        seen(b"", "hosts"),
        seen(b"", "status", "probe-1a2b3c4d"),
        seen(b"", "status", "t1"),
        hop("t1"),
    )

    assert through(MessageFilter(routine=False), *traffic) == [3, 4]
    assert through(MessageFilter(), *traffic) == [0, 1, 2, 3, 4]
