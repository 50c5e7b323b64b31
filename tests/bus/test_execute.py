import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from msgspec.structs import replace
from support.builders import ad, awarded, envelope
from support.fake_host import FakeHost, FakeRun
from support.phase_harness import Stage, quiet
from support.wait import until

from loom.bus.hops.delivery import Delivery, Slots
from loom.bus.hops.isolation import SharedExclusiveLock
from loom.bus.hops.outcomes import Next
from loom.bus.natsio.transport.message import Msg
from loom.bus.topology import EXECUTE_LANE
from loom.phases.execute.service import Execute
from loom.phases.execute.timings import ExecuteTimings
from loom.runner.timings import ServiceTimings
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Claim, Envelope, Split
from loom.schemas.events import TextDelta, ToolCallStart
from loom.schemas.run import RunRequest
from loom.schemas.task import Accept, RunResult, TaskError

Script = Callable[[FakeRun], Awaitable[None]]


@pytest.fixture
def timings() -> ServiceTimings:
    return ServiceTimings(execute=ExecuteTimings(accept_s=0.4, silence_s=0.6))


async def host(stage: Stage, run: Script | None = FakeRun.succeed, host_id: str = "h1") -> FakeHost:
    return await FakeHost(await stage.connect("node"), host_id, run=run).start()


async def given(stage: Stage, *, recorded: bool = True, **facts: Any) -> Envelope:
    """An awarded task, admitted, on its way to EXECUTE."""
    about = {name: facts.pop(name) for name in list(facts) if name in Envelope.__struct_fields__}
    env = awarded(envelope(ad(**facts), now=stage.bus.clock.now(), **about))
    if recorded:
        await stage.record(env)
    await stage.put("execute", env)
    return env


async def outcome(stage: Stage, *, count: int = 1, **tokens: str) -> Envelope:
    found: Envelope = await stage.seen("task", phase="evaluate", count=count, **tokens)
    return found


async def code_of(stage: Stage) -> str:
    error = (await outcome(stage)).error
    assert error is not None
    return error.code


async def accepted(run: FakeRun) -> None:
    """Accept, start, and publish no more."""
    await run.publish("accepted")
    await run.publish("started")


# -- successful runs


async def test_a_run_is_claimed_run_and_handed_to_evaluate(stage: Stage) -> None:
    one = await host(stage, lambda run: run.succeed("42", prompt_tokens=3, completion_tokens=4))
    execute = await stage.phase("execute")
    env = await given(stage, token_budget=100)
    done = await outcome(stage)
    assert done.result == RunResult(content="42", prompt_tokens=3, completion_tokens=4)
    assert (done.error, done.budget, done.award) == (None, 93, env.award)
    claim = (await stage.read(env.task_id)).claim
    assert (claim.attempt, claim.node_id, claim.host_id, claim.instance) == (1, "n1", "h1", execute.bus.instance)
    assert claim.stream_seq > 0
    assert len(one.runs) == 1


async def test_the_run_request_has_all_the_host_needs(stage: Stage) -> None:
    one = await host(stage)
    await stage.phase("execute")
    split = Split(parent="p", depth=2, deadline=0, inputs={"a": "from a"})
    env = await given(
        stage,
        description="do it",
        domain="数据",
        context={"k": [1]},
        accept=Accept(contains=("done",)),
        required_tools=("search",),
        priority="high",
        attempt=2,
        budget=77,
        split=split,
        inputs={"b": "from b"},
        trace="00-x",
    )
    await outcome(stage)
    asked = one.runs[0].request
    assert asked.deadline == env.deadline
    assert asked.sent_at is not None
    assert replace(asked, remaining_s=1, deadline=None, sent_at=None) == RunRequest(
        task_id=env.task_id,
        attempt=2,
        node_id="n1",
        domain="数据",
        description="do it",
        complexity=0.3,
        context={"k": [1]},
        inputs={"a": "from a", "b": "from b"},
        accept=Accept(contains=("done",)),
        tools=("search",),
        token_budget=77,
        remaining_s=1,
        priority="high",
        depth=2,
        trace="00-x",
    )
    assert 50 < asked.remaining_s <= 60


async def test_progress_is_relayed_numbered_and_in_order(stage: Stage) -> None:
    async def chat(run: FakeRun) -> None:
        await accepted(run)
        for n in range(20):
            await run.publish("delta", event=TextDelta(text=str(n)))
        await run.publish("heartbeat")
        await run.publish("tool_call", event=ToolCallStart(tool_call_id="c", name="search"))
        await run.publish("result", result=RunResult(content="x"))

    await host(stage, chat)
    await stage.phase("execute")
    await given(stage, attempt=3)
    await outcome(stage)
    deltas = stage.all("delta")
    assert [delta.event.text for delta in deltas[:-1]] == [str(n) for n in range(20)]
    assert isinstance(deltas[-1].event, ToolCallStart)
    assert [delta.seq for delta in deltas] == [*range(2, 22), 23]
    assert {delta.attempt for delta in deltas} == {3}
    assert [delta.at for delta in deltas] == [*range(11), *range(12, 31, 2)]


@pytest.mark.slow
async def test_the_text_of_progress_is_counted_over_a_silence_of_the_host(stage: Stage) -> None:
    async def pause(run: FakeRun) -> None:
        """Publish a half, and the other half when asked again."""
        run.seq = run.request.from_seq
        if not run.request.from_seq:
            await accepted(run)
            await run.publish("delta", event=TextDelta(text="né𝄞"))
        else:
            await run.publish("delta", event=TextDelta(text="end"))
            await run.publish("result", result=RunResult(content="né𝄞end"))

    await host(stage, pause)
    await stage.phase("execute")
    await given(stage)
    await outcome(stage)

    assert [(delta.at, delta.event.text) for delta in stage.all("delta")] == [(0, "né𝄞"), (3, "end")]


async def test_an_event_that_comes_twice_is_relayed_once(stage: Stage) -> None:
    async def stutter(run: FakeRun) -> None:
        await accepted(run)
        for _ in range(3):
            run.seq = 2
            await run.publish("delta", event=TextDelta(text="once"))
        await run.publish("result", result=RunResult(content="x"))

    await host(stage, stutter)
    await stage.phase("execute")
    await given(stage)
    await outcome(stage)
    assert len(stage.all("delta")) == 1


async def test_content_of_a_host_beyond_the_limit_is_cut(stage: Stage) -> None:
    await host(stage, lambda run: run.succeed("数" * 100_000))
    await stage.phase("execute")
    await given(stage)
    result = (await outcome(stage)).result
    assert result is not None
    assert result.truncated
    assert 60_000 < len(result.content.encode()) <= 64 * 1024


async def test_bytes_that_are_not_an_event_are_left_out(stage: Stage) -> None:
    async def mumble(run: FakeRun) -> None:
        await run.bus.connection.publish(run.subject, b"\xff{")
        await run.bus.connection.publish(run.subject, b'{"seq": -1, "kind": "sings"}')
        await run.succeed()

    await host(stage, mumble)
    await stage.phase("execute")
    await given(stage)
    assert (await outcome(stage)).error is None


# -- failed runs


async def nothing(_run: FakeRun) -> None:
    """Do not even accept."""


async def hang(run: FakeRun) -> None:
    """Accept, and go on publishing heartbeats."""
    await accepted(run)
    while True:
        await run.publish("heartbeat")
        await asyncio.sleep(0.1)


async def busy(run: FakeRun) -> None:
    await run.publish("rejected", code="busy")


async def cannot(run: FakeRun) -> None:
    await run.publish("rejected", code="unqualified")


async def fail(run: FakeRun) -> None:
    await accepted(run)
    await run.publish("error", error=TaskError(code="budget_exceeded", message="spent"))


async def no_result(run: FakeRun) -> None:
    await accepted(run)
    await run.publish("result")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "code"),
    [
        (nothing, "node_lost"),
        (accepted, "node_lost"),
        (busy, "node_busy"),
        (cannot, "node_lost"),
        (fail, "agent_failed"),
        (no_result, "agent_failed"),
    ],
)
async def test_the_failure_of_a_run_is_reported_with_its_node(stage: Stage, script: Script, code: str) -> None:
    await host(stage, script)
    await stage.phase("execute")
    env = await given(stage)
    failed = await outcome(stage)
    assert failed.error is not None
    assert (failed.error.code, failed.error.node_id) == (code, "n1")
    assert (failed.result, failed.award) == (None, env.award)


@pytest.mark.parametrize(
    ("claimed", "facts", "tokens", "believed"),
    [
        ("budget_exceeded", {"token_budget": 10}, 10, "budget_exceeded"),
        ("budget_exceeded", {"token_budget": 10}, 4, "agent_failed"),
        ("deadline_exceeded", {"left_s": 0.9}, 0, "deadline_exceeded"),
        ("deadline_exceeded", {"left_s": 60}, 0, "agent_failed"),
        ("subtask_failed", {}, 0, "agent_failed"),
        ("cancelled", {}, 0, "agent_failed"),
        ("invalid_task", {}, 0, "invalid_task"),
        ("no_bids", {}, 0, "agent_failed"),
        ("node_busy", {}, 0, "node_busy"),
    ],
)
async def test_the_code_of_a_host_counts_as_far_as_facts_confirm_it(
    stage: Stage, claimed: str, facts: dict[str, Any], tokens: int, believed: str
) -> None:
    async def end(run: FakeRun) -> None:
        await run.publish("accepted")
        result = RunResult(prompt_tokens=tokens) if tokens else None
        await run.publish("error", error=TaskError(code=claimed, message="so it is"), result=result)

    await host(stage, end)
    await stage.phase("execute")
    about = {name: value for name, value in facts.items() if name != "left_s"}
    await given(stage, deadline=stage.bus.clock.now() + facts.get("left_s", 30), **about)
    error = (await outcome(stage)).error
    assert error is not None
    assert (error.code, error.message, error.node_id) == (believed, "so it is", "n1")


async def test_an_unknown_host_is_a_lost_node(stage: Stage) -> None:
    await stage.phase("execute")
    await given(stage)
    assert await code_of(stage) == "node_lost"


@pytest.mark.slow
async def test_a_run_is_lost_only_when_its_heartbeats_stop(stage: Stage) -> None:
    async def falter(run: FakeRun) -> None:
        await accepted(run)
        for _ in range(8):
            await run.publish("heartbeat")
            await asyncio.sleep(0.15)  # twice as long as silence is borne, in all

    await host(stage, falter)
    await stage.phase("execute")
    await given(stage)
    failed = await outcome(stage)
    assert failed.error is not None
    assert failed.error.code == "node_lost"
    assert failed.hops[-1].finished - failed.hops[-1].started > 1.2


@pytest.mark.slow
async def test_a_result_lost_on_its_way_is_asked_for_again(stage: Stage) -> None:
    async def mumble(run: FakeRun) -> None:
        """Lose the last event; publish it when asked once more."""
        run.seq = run.request.from_seq
        await run.publish("accepted")
        if run.request.from_seq:
            await run.publish("result", result=RunResult(content="as before"))

    one = await host(stage, mumble)
    await stage.phase("execute")
    await given(stage)
    done = await outcome(stage)

    assert done.error is None
    assert done.result == RunResult(content="as before")
    assert [run.request.from_seq for run in one.runs] == [0, 1]


async def test_a_run_past_its_deadline_fails(stage: Stage) -> None:
    await host(stage, hang)
    await stage.phase("execute")
    now = stage.bus.clock.now()
    await given(stage, deadline=now + 0.4)
    failed = await outcome(stage)
    assert failed.error is not None
    assert failed.error.code == "deadline_exceeded"
    assert failed.hops[-1].finished == pytest.approx(now + 0.4, abs=0.4)


async def test_a_task_that_comes_too_late_is_not_run(stage: Stage) -> None:
    one = await host(stage)
    await stage.phase("execute")
    env = await given(stage, deadline=stage.bus.clock.now() - 1)
    assert await code_of(stage) == "deadline_exceeded"
    assert not one.runs
    assert (await stage.read(env.task_id)).claim == Claim()


async def test_a_cancelled_run_is_given_up_at_once(stage: Stage) -> None:
    one = await host(stage, hang)
    await stage.phase("execute")
    env = await given(stage)
    await until(lambda: one.runs, what="it runs")
    await stage.bus.connection.publish(stage.bus.subjects.of("cancelled", "another-task"))
    await stage.bus.connection.publish(stage.bus.subjects.of("cancelled", env.task_id))
    assert await code_of(stage) == "cancelled"
    assert stage.bus.clock.now() - env.deadline < -58


async def test_a_cancel_takes_effect_while_the_attempt_is_being_claimed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await host(stage, hang)
    execute: Any = await stage.phase("execute")
    claim, env = execute.service._claim, envelope(ad(), now=stage.bus.clock.now())

    async def cancelled_meanwhile(*args: Any) -> Any:
        await stage.bus.connection.publish(stage.bus.subjects.of("cancelled", env.task_id))
        await quiet(stage.bus, execute.bus)
        return await claim(*args)

    monkeypatch.setattr(execute.service, "_claim", cancelled_meanwhile)
    await stage.record(env)
    await stage.put("execute", awarded(env))
    assert await code_of(stage) == "cancelled"
    assert not one.runs


async def test_an_envelope_without_an_award_is_a_dead_letter(stage: Stage) -> None:
    await stage.phase("execute")
    await stage.put("execute", envelope(now=stage.bus.clock.now()))
    await stage.seen("dead", phase="execute")
    assert await code_of(stage) == "dead_letter"


# -- the fence


@pytest.mark.parametrize(
    "facts",
    [
        {"claim": Claim(attempt=2, node_id="n1", host_id="h1")},
        {"claim": Claim(attempt=1, node_id="n1", host_id="h2")},
        {"state": "succeeded", "ended_at": 1.0},
    ],
)
async def test_a_twin_is_dropped_in_silence(stage: Stage, facts: dict[str, Any]) -> None:
    one = await host(stage)
    await stage.phase("execute")
    env = awarded(envelope(now=stage.bus.clock.now()))
    record = await stage.record(env, **facts)
    await stage.put("execute", env)
    await stage.settled()
    assert not one.runs
    assert not stage.all("task", phase="evaluate")
    assert await stage.read(env.task_id) == record


async def test_a_task_without_a_record_is_dropped(stage: Stage) -> None:
    one = await host(stage)
    await stage.phase("execute")
    await given(stage, recorded=False)
    await stage.settled()
    assert not one.runs


async def test_a_later_attempt_takes_over_from_an_earlier_one(stage: Stage) -> None:
    await host(stage)
    await stage.phase("execute")
    env = awarded(envelope(now=stage.bus.clock.now(), attempt=2))
    await stage.claimed(env, attempt=1)
    await stage.put("execute", env)
    await outcome(stage)
    assert (await stage.read(env.task_id)).claim.attempt == 2


class MovingHost:
    """One run that, like a real host's, sends its events to the newest watcher."""

    def __init__(self, *, publishes_moved: bool = True) -> None:
        self.publishes_moved = publishes_moved
        self.watcher: FakeRun | None = None

    async def __call__(self, run: FakeRun) -> None:
        if self.watcher is not None and self.publishes_moved:
            await self.watcher.publish("moved")
        self.watcher = run
        await accepted(run)
        while self.watcher is run:
            await run.publish("heartbeat")
            await asyncio.sleep(0.05)

    async def finish(self) -> None:
        watcher, self.watcher = self.watcher, None
        assert watcher is not None
        await watcher.publish("result", result=RunResult(content="at last"))


async def test_the_copy_of_a_message_reattaches_to_the_run_and_the_first_ends(stage: Stage) -> None:
    moving = MovingHost()
    one = await host(stage, moving)
    await stage.phase("execute")
    env = await given(stage)
    await until(lambda: len(one.runs) == 1, what="it runs")
    first = (await stage.read(env.task_id)).claim
    second = await stage.phase("execute")
    await stage.put("execute", env)  # as is left when a replica dies between passing it on and settling it
    await until(lambda: len(one.runs) == 2, what="a second watcher")
    assert [run.request.attempt for run in one.runs] == [1, 1]
    await stage.settled(left=1)  # the first copy, though it has no result
    assert not stage.all("task", phase="evaluate")
    await moving.finish()
    assert (await outcome(stage)).result == RunResult(content="at last")
    assert (await stage.read(env.task_id)).claim.stream_seq > first.stream_seq
    await quiet(stage.bus, second.bus)
    assert len(stage.all("task", phase="evaluate")) == 1
    assert len(one.runs) == 2


async def test_a_host_that_states_a_move_that_did_not_happen_has_failed(stage: Stage) -> None:
    async def lie(run: FakeRun) -> None:
        await accepted(run)
        await run.publish("moved")

    one = await host(stage, lie)
    execute = await stage.phase("execute")
    await given(stage)
    assert await code_of(stage) == "agent_failed"
    await until(lambda: one.stops, what="it is stopped")
    assert execute.bus.discards.hosts["h1"].counts == {"events": 1}


@pytest.mark.slow
async def test_a_stale_copys_error_is_settled_silently(stage: Stage) -> None:
    """Its host stops sending to the first watcher without an event that the run has moved."""
    moving = MovingHost(publishes_moved=False)
    one = await host(stage, moving)
    await stage.phase("execute")
    env = await given(stage)
    await until(lambda: one.runs, what="it runs")
    await stage.put("execute", env)
    await stage.settled(left=1)
    assert not stage.all("task", phase="evaluate")
    await moving.finish()
    assert (await outcome(stage)).error is None


@pytest.mark.slow
@pytest.mark.parametrize("publishes_moved", [True, False])
async def test_a_replica_that_was_overtaken_leaves_the_message_to_the_other(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, publishes_moved: bool
) -> None:
    """The first replica lives but has sent the server no progress ack for too long."""
    await stage.hurry(EXECUTE_LANE, 0.3)
    moving = MovingHost(publishes_moved=publishes_moved)
    one = await host(stage, moving)
    monkeypatch.setattr("loom.phases.execute.service.SLOTS", 1)
    await stage.phase("execute")
    env = await given(stage)
    await until(lambda: len(one.runs) == 1, what="it runs")
    first = (await stage.read(env.task_id)).claim
    monkeypatch.setattr("loom.bus.hops.hop_loop.IN_PROGRESS_S", 0.05)
    second = await stage.phase("execute")
    await until(lambda: len(one.runs) == 2, what="the other replica re-attached")
    claim = (await stage.read(env.task_id)).claim
    assert (claim.instance, claim.stream_seq, claim.attempt) == (second.bus.instance, first.stream_seq, 1)
    overtaken = (
        stage.bus.clock.now()
    )  # by 0.8 s later the first has given up on the host, and the server would deliver the message again
    await until(lambda: stage.bus.clock.now() > overtaken + 0.8, what="both have had their time")
    assert await stage.pending("TASKS") == 1
    assert not stage.all("task", phase="evaluate")
    await moving.finish()
    done = await outcome(stage)
    assert (done.result, done.hops[-1].instance) == (RunResult(content="at last"), second.bus.instance)
    await stage.settled(phase="execute")


async def test_a_dead_replicas_run_goes_on_under_another(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loom.bus.hops.hop_loop.IN_PROGRESS_S", 0.05)
    await stage.hurry(EXECUTE_LANE, 0.3)
    moving = MovingHost()
    one = await host(stage, moving)
    dying = await stage.phase("execute")
    env = await given(stage)
    await until(lambda: len(one.runs) == 1, what="it runs")
    dying.die()
    await stage.phase("execute")
    await until(lambda: len(one.runs) == 2, what="the other replica re-attached")
    await moving.finish()
    assert (await outcome(stage)).result == RunResult(content="at last")
    assert (await stage.read(env.task_id)).claim.attempt == 1
    await stage.settled(phase="execute")


async def test_a_suspect_message_returns_to_its_own_subject_once_its_run_has_shown_life(stage: Stage) -> None:
    moving = MovingHost()
    one = await host(stage, moving)
    env = await given(stage)
    await stage.reject(EXECUTE_LANE, 3)
    await stage.phase("execute")
    back = await stage.seen("task", phase="execute", count=2)
    assert (back.attempt, back.step) == (1, env.step + 1)
    await until(lambda: len(one.runs) == 2, what="it is watched again, as any other")
    await moving.finish()
    assert (await outcome(stage)).error is None
    await stage.settled(phase="execute")


async def test_a_drained_replica_passes_its_runs_on(stage: Stage) -> None:
    moving = MovingHost()
    one = await host(stage, moving)
    leaving = await stage.phase("execute")
    env = await given(stage)
    await until(lambda: len(one.runs) == 1, what="it runs")
    await leaving.service.drain(0.05)
    handed = await stage.seen("task", phase="execute", count=2)
    assert (handed.attempt, handed.award, handed.step) == (1, env.award, env.step + 1)
    await stage.phase("execute")
    await until(lambda: len(one.runs) == 2, what="the other replica re-attached")
    await moving.finish()
    assert (await outcome(stage)).result == RunResult(content="at last")
    assert len(stage.all("task", phase="evaluate")) == 1


async def test_a_message_that_is_recalled_before_its_run_begins_is_handed_on(stage: Stage) -> None:
    await host(stage, accepted)
    execute = await stage.phase("execute")
    await execute.service.drain(0)
    env = awarded(envelope(ad(), now=stage.bus.clock.now()))
    await stage.record(env)
    delivery = Delivery(Msg("t.task.execute.normal.t1", "$JS.ACK.S.C.1.7.1.1.0"), Slots(1), SharedExclusiveLock())
    delivery.recall()
    handled = await asyncio.wait_for(Execute(execute.bus, ClusterConfig()).handle(env, delivery), 10)
    assert isinstance(handled, Next)
    assert handled.phase == "execute"


async def test_a_drain_waits_for_runs_that_end_in_time(stage: Stage) -> None:
    moving = MovingHost()
    one = await host(stage, moving)
    leaving = await stage.phase("execute")
    await given(stage)
    await until(lambda: len(one.runs) == 1, what="it runs")
    draining = asyncio.ensure_future(leaving.service.drain(5))
    await moving.finish()
    await draining
    assert (await outcome(stage)).error is None
    assert len(stage.all("task", phase="execute")) == 1


async def test_many_runs_go_side_by_side(stage: Stage) -> None:
    together = asyncio.Event()
    one = await host(stage, None)

    async def meet(run: FakeRun) -> None:
        await run.publish("accepted")
        if len(one.runs) == 40:
            together.set()
        await together.wait()
        await run.publish("result", result=RunResult(content=run.request.task_id))

    one.run = meet
    await stage.phase("execute")
    await stage.phase("execute")
    for n in range(40):
        await given(stage, task_id=f"t{n}")
    await outcome(stage, count=40)
    done = stage.all("task", phase="evaluate")
    assert all(env.result.content == env.task_id for env in done)
