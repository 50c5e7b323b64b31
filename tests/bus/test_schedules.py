"""A message that a schedule has moved is taken only from the phases that may schedule it, for its own task."""

import pytest
from support.bus_helpers import envelope
from support.loop_harness import Phases, arrived, hop, put, settled

from loom.bus.bus import Bus
from loom.bus.hops.hop_loop import schedule
from loom.bus.hops.schedules import SCHEDULERS, forbidden_scheduler, may_schedule
from loom.bus.natsio.server_errors import Refused
from loom.bus.natsio.transport.message import Msg
from loom.bus.topology import MATCH_LANES
from loom.schemas.envelope import PHASES, Phase


async def soon(bus: Bus, by: str, target_task: str = "t1", task: str = "t1", to: str = "scale") -> None:
    """Schedule a hop to a phase under a subject of the phase `by`."""
    await schedule(
        bus,
        bus.subjects.later(by, task, "task-1"),
        target=bus.subjects.task(to, "normal", target_task),
        at=bus.clock.now() + 0.05,
        message=envelope(target_task),
        msg_id=f"{by}:{task}",
    )


async def test_a_phase_takes_its_own_scheduled_messages(bus: Bus, phases: Phases) -> None:
    phase = await phases.start(bus)
    await soon(bus, "scale")
    await phase.count(1)
    await settled(bus, 0)


@pytest.mark.parametrize(("by", "task"), [("match", "t1"), ("evaluate", "t1"), ("scale", "t2")])
async def test_a_message_that_another_phase_or_task_has_scheduled_is_a_dead_letter(
    bus: Bus, phases: Phases, by: str, task: str
) -> None:
    phase = await phases.start(bus)
    await soon(bus, by, task=task)
    letter = await arrived(bus, "DEAD", bus.subjects.of("dead", "scale", "t1"))
    assert letter.headers["Loom-Dead-reason"] == f"scheduled by {bus.subjects.later(by, task, 'task-1')}"
    assert phase.handled == []
    ended = (await hop(bus, "evaluate")).envelope
    assert ended.error is not None
    assert ended.error.code == "dead_letter"


async def test_the_header_is_compared_exactly(bus: Bus, phases: Phases) -> None:
    if bus.connection.server_version < (2, 14):
        pytest.skip("nats-server before 2.14 accepts the header from clients")
    phase = await phases.start(bus)
    subject, forged = bus.subjects.task("scale", "normal", "t1"), bus.subjects.later("match", "t1", "x")
    with pytest.raises(Refused, match="invalid scheduler"):
        await bus.jetstream.publish(subject, envelope(), headers={"Nats-Scheduler": forged})
    await bus.jetstream.publish(
        subject, envelope(), headers={"nats-scheduler": forged}
    )  # any client's header without a meaning
    await phase.count(1)


async def test_a_message_without_a_schedule_passes_unchecked(bus: Bus, phases: Phases) -> None:
    phase = await phases.start(bus)
    await put(bus, envelope())
    await phase.count(1)


@pytest.mark.parametrize("by", ["match", "evaluate"])
async def test_match_takes_its_own_schedules_and_those_of_evaluate(bus: Bus, phases: Phases, by: str) -> None:
    phase = await phases.start(bus, phase="match", lanes=[(MATCH_LANES[1], 4)])
    await soon(bus, by, to="match")
    await phase.count(1)
    await settled(bus, 0)


@pytest.mark.parametrize("by", ["sense", "scale", "execute", "adapt"])
async def test_match_takes_no_schedule_of_another_phase(bus: Bus, phases: Phases, by: str) -> None:
    phase = await phases.start(bus, phase="match", lanes=[(MATCH_LANES[1], 4)])
    await soon(bus, by, to="match")
    letter = await arrived(bus, "DEAD", bus.subjects.of("dead", "match", "t1"))
    assert letter.headers["Loom-Dead-reason"] == f"scheduled by {bus.subjects.later(by, 't1', 'task-1')}"
    assert phase.handled == []


TARGET = "ns.task.match.normal.t1"
TRUE = b"Nats-Scheduler: ns.later.execute.t1.x\r\nNats-Schedule-Next: purge\r\n\r\n"
"""What the server writes behind the headers of a message that a schedule of EXECUTE has moved."""


@pytest.mark.parametrize(
    "forged",
    [
        b" Nats-Scheduler: ns.later.match.t1.x\r\n",
        b"\tNats-Scheduler:ns.later.match.t1.x\r\n",
        b"X: 1\rNats-Scheduler: ns.later.match.t1.x\r\n",
        b"nats-scheduler: ns.later.match.t1.x\r\n",
        b"X: Nats-Scheduler: ns.later.match.t1.x\r\n",
    ],
)
def test_a_name_that_the_server_accepts_does_not_hide_the_scheduling_phase(forged: bytes) -> None:
    """All of these were stored by nats-server 2.15, and stood before its own header in the message it moved."""
    moved = Msg(TARGET, raw_headers=b"NATS/1.0\r\n" + forged + TRUE)
    assert forbidden_scheduler(moved) == "ns.later.execute.t1.x"
    direct = Msg(TARGET, raw_headers=b"NATS/1.0\r\n" + forged + b"\r\n")
    assert forbidden_scheduler(direct) is None


@pytest.mark.parametrize(
    "target", ["ns.later.match.t1.x", "ns.intake.public.normal.t1", "ns.dead.match.t1", "ns.submit"]
)
def test_a_schedule_reaches_hops_alone(target: str) -> None:
    assert not may_schedule("ns.later.match.t1.x", target)


@pytest.mark.parametrize("phase", PHASES)
def test_each_phase_takes_its_own_schedules_and_match_those_of_evaluate_too(phase: Phase) -> None:
    taken = {by for by in PHASES if may_schedule(f"ns.later.{by}.t.o", f"ns.task.{phase}.low.t")}
    assert taken == SCHEDULERS[phase]
    assert taken == {"match": {"match", "evaluate"}, "adapt": set()}.get(phase, {phase})


@pytest.mark.parametrize(
    "scheduler",
    [
        "",
        "ns.later.match.t",
        "ns.later.match.u.o",
        "other.later.match.t.o",
        "ns.task.match.low.t",
        "ns.later.match.t.o.o",
    ],
)
def test_any_other_subject_schedules_nothing(scheduler: str) -> None:
    assert not may_schedule(scheduler, "ns.task.match.low.t")
