from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loom.agents.host.run_table import FINISHED_S, FinishedRuns
from loom.agents.host.runs import Run
from loom.agents.host.slots import RunQueue, RunQueues
from loom.agents.host.timings import HostTimings
from loom.bus.bus import Bus
from loom.phases.execute.timings import HEARTBEAT_S, ExecuteTimings
from loom.phases.match.calls import presence
from loom.schemas.auction import Bid
from loom.schemas.run import RunRequest
from loom.schemas.task import PRIORITIES, Priority, RunResult
from loom.types import AgentNode, CapabilityProfile


@pytest.fixture
def run() -> Iterator[Callable[..., Run]]:
    made = iter(range(10_000))

    def make(priority: Priority = "normal", **facts: Any) -> Run:
        request = RunRequest(task_id=f"t{next(made)}", description="x", priority=priority, **facts)
        return Run(cast("Bus", None), request, "inbox")

    return make


def fill(room: RunQueue, runs: list[Run]) -> list[Run]:
    for one in runs:
        room.enqueue(one)
    started = []
    while (one := room.start_next()) is not None:
        started.append(one)
    return started


def test_slots_are_filled_first_and_the_rest_waits(run: Callable[..., Run]) -> None:
    room = RunQueue(2, 3)
    runs = [run() for _ in range(5)]
    assert fill(room, runs) == runs[:2]
    assert (room.queued, room.full, room.load) == (3, True, 1.0)


def test_the_backlog_is_ordered_by_priority_then_by_arrival(run: Callable[..., Run]) -> None:
    room = RunQueue(1, 9)
    fill(room, [run()])
    waiting = [run("low"), run("normal"), run("critical"), run("high"), run("critical"), run("normal")]
    for one in waiting:
        room.enqueue(one)
    order = []
    while room.queued:
        room.running.clear()
        order.append(room.start_next())
    assert order == [waiting[i] for i in (2, 4, 3, 1, 5, 0)]


def test_a_cancelled_run_leaves_the_backlog_at_once(run: Callable[..., Run]) -> None:
    room = RunQueue(1, 2)
    fill(room, [run()])
    first, second = run(), run()
    room.enqueue(first)
    room.enqueue(second)
    assert room.full
    room.remove(first)
    assert (room.queued, room.full) == (1, False)
    room.running.clear()
    assert room.start_next() is second


def test_each_change_of_the_load_is_reported(run: Callable[..., Run]) -> None:
    reported: list[float] = []
    room = RunQueue(1, 9, lambda: reported.append(room.load))
    first, second = run(), run()
    room.enqueue(first)
    assert room.start_next() is first
    first.work = cast("Any", "a task")
    room.enqueue(second)
    before = room.load
    room.suspend(first)
    assert reported[-1] == room.load < before
    room.resume(first)
    assert reported[-1] == room.load == before
    room.remove(second)
    assert reported[-1] == room.load < before
    room.remove(first)
    assert reported[-1] == room.load == 0


def test_the_nodes_whose_load_has_changed_are_known_since_any_change(run: Callable[..., Run]) -> None:
    queues = RunQueues(1, 9)
    for name in ("a", "b", "c", "a"):
        queues.get_or_create(name).enqueue(run())
    assert [queues.changed_since(seen) for seen in range(5)] == [
        ["a", "c", "b"],
        ["a", "c", "b"],
        ["a", "c"],
        ["a"],
        [],
    ]
    queues.remove("a")
    assert queues.changed_since(1) == ["c", "b"]


def test_an_idle_room_has_no_load_and_is_not_full() -> None:
    room = RunQueue(4, 16)
    assert (room.load, room.full, room.queued) == (0, False, 0)


def test_a_room_without_backlog_is_full_with_its_slots(run: Callable[..., Run]) -> None:
    room = RunQueue(1, 0)
    fill(room, [run()])
    assert room.full


@given(st.lists(st.sampled_from(PRIORITIES), max_size=20), st.integers(1, 4), st.integers(0, 8))
def test_load_stays_in_range_and_no_more_runs_than_slots(asked: list[Priority], slots: int, backlog: int) -> None:
    room = RunQueue(slots, backlog)
    for priority in asked:
        if not room.full:
            request = RunRequest(task_id="t", description="x", priority=priority)
            fill(room, [Run(cast("Bus", None), request, "")])
        assert 0 <= room.load <= 1
        assert len(room.running) <= slots
        assert len(room.running) + room.queued <= slots + backlog
    assert room.full is (len(asked) >= slots + backlog)


def test_a_bid_has_the_nodes_claim_and_tools_and_the_rooms_numbers(run: Callable[..., Run]) -> None:
    node = AgentNode(id="n1", capabilities=CapabilityProfile(scores={"Code": 0.9}, tools=["search"]), load=0.0)
    room = RunQueue(1, 3)
    fill(room, [run(), run()])
    room.record_usage(RunResult(content="x", prompt_tokens=100, duration_s=2.0))
    room.record_usage(RunResult(content="x", prompt_tokens=200, duration_s=4.0))
    assert room.bid(node, "code", ("search", "shell")) == Bid(
        node_id="n1",
        self_rating=0.9,
        load=0.5,
        tools=("search",),
        expected_tokens=130,
        expected_s=2.6,
        backlog=1,
        free=2,
    )


def test_the_end_of_a_run_is_kept_ten_minutes() -> None:
    finished = FinishedRuns()
    finished.keep(("t", 1), b"end", 0.0)
    finished.keep(("u", 1), b"end", FINISHED_S)
    assert finished.get(("t", 1)) == b"end"
    finished.keep(("v", 1), b"end", FINISHED_S + 1)
    assert finished.get(("t", 1)) is None
    assert finished.get(("u", 1)) == b"end"


def test_the_size_of_the_kept_events_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loom.agents.host.run_table.FINISHED_BYTES", 5_000)
    finished = FinishedRuns()
    for i in range(10):
        finished.keep((f"t{i}", 1), b"x" * 1100, float(i))
    kept = [i for i in range(10) if finished.get((f"t{i}", 1))]
    assert kept == [6, 7, 8, 9]


def test_a_run_ended_twice_is_kept_once() -> None:
    finished = FinishedRuns()
    for end in (b"old", b"new"):
        finished.keep(("t", 1), end, 0.0)
    assert finished.get(("t", 1)) == b"new"
    assert finished._bytes == len(b"new")


def test_hosts_speak_as_often_as_the_phases_listen() -> None:
    """Neither side imports the other; both follow the design."""
    timings = ExecuteTimings()
    assert HostTimings.heartbeat_s == HEARTBEAT_S == 2
    assert 3 * HEARTBEAT_S <= timings.silence_s < 4 * HEARTBEAT_S
    assert timings.absent_s < HostTimings.heartbeat_s < timings.accept_s
    assert 3 * HostTimings.announce_s <= presence.ALIVE_S == 10
