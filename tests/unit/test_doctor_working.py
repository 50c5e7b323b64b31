"""The findings of doctor from the reports of phases that answer."""

from typing import Any

import pytest

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.hops.health import Health
from loom.bus.logs.discard_reports import DiscardReport
from loom.bus.topology import Inspection, Part
from loom.runner.doctor import diagnosis
from loom.runner.doctor import working as doctor_working
from loom.runner.doctor.working import OLD_S, Look, judged, waiting_in
from loom.schemas.config import ClusterConfig
from loom.schemas.errors import BusUnavailable


def look(*, waiting: int = 0, last_reward: int = 0, **reports: Health) -> Look:
    return Look({"match": waiting}, last_reward, {phase: [report] for phase, report in reports.items()})


def verdicts(before: Look, after: Look | None = None) -> dict[str, str]:
    found = list(judged(before, after or before))
    assert all(finding.todo for finding in found)
    return {finding.about: f"{finding.mark}: {finding.message}" for finding in found}


def test_an_idle_or_working_phase_is_ok() -> None:
    assert verdicts(look(match=Health())) == {}
    assert verdicts(look(waiting=9, match=Health(in_hand=3))) == {}
    moving = look(waiting=9, match=Health(handled=1)), look(waiting=9, match=Health(handled=2))
    assert verdicts(*moving) == {}


def test_waiting_messages_without_progress_are_a_failure() -> None:
    still = look(waiting=9, match=Health(handled=5))
    assert verdicts(still, still) == {"work match": "fail: waiting messages: 9; none is taken"}


def test_a_failed_essential_task_is_a_failure() -> None:
    found = verdicts(look(adapt=Health(last_seq=0, failure="fold rewards: ValueError: x")))
    assert found == {"work adapt": "fail: an essential task has failed: fold rewards: ValueError: x"}


def test_a_long_unacknowledged_message_is_a_failure_unless_it_is_a_run() -> None:
    old = Health(in_hand=1, oldest_s=OLD_S + 1)
    assert verdicts(look(match=old)) == {"work match": "fail: has had something in hand for 121 s"}
    assert verdicts(look(execute=old)) == {}


@pytest.mark.parametrize(
    ("read", "mark"),
    [((5, 5), "fail"), ((5, 7), "warn"), ((5, 9), "")],
    ids=["stands still", "catches up", "has caught up"],
)
def test_a_reader_of_rewards_behind_its_stream_is_found(read: tuple[int, int], mark: str) -> None:
    before, after = (look(last_reward=9, adapt=Health(last_seq=seq)) for seq in read)
    assert verdicts(before, after).get("work adapt", "").partition(":")[0] == mark


def test_one_replica_at_the_end_of_the_stream_is_enough() -> None:
    both = Look({}, 9, {"adapt": [Health(last_seq=9), Health(last_seq=2)]})
    assert verdicts(both) == {}


def test_messages_that_were_left_out_are_listed() -> None:
    found = verdicts(look(match=Health(discards={"bid_undecodable": 2}), adapt=Health(discards={"x": 1}, last_seq=0)))
    assert found == {"discards": "warn: messages were left out: 2 bid_undecodable, 1 x"}


def consumers(**pending: int) -> Inspection:
    def part(name: str, count: int) -> Part:
        info: dict[str, Any] = {"num_pending": count, "num_ack_pending": 0}
        return Part(name, info, ())

    return Inspection({}, {name: part(name, count) for name, count in pending.items()})


def test_lanes_of_a_phase_count_together_and_a_full_cluster_lets_the_intake_wait() -> None:
    seen = consumers(intake_low=3, sense=1, match_low=2, match_critical=2)
    assert waiting_in(seen, ClusterConfig()) == {"sense": 4, "match": 4}
    assert waiting_in(seen, ClusterConfig(max_in_flight=5)) == {"sense": 1, "match": 4}


def left_out(at: float, **counts: int) -> DiscardReport:
    return DiscardReport(counts=counts, last="Expected `int`", at=at)


def test_discarded_messages_of_hosts_are_one_line_for_each_of_the_last_ten() -> None:
    hosts = {f"h{number}": left_out(number, offers=number) for number in range(1, 13)}
    seen = Look(
        {}, 0, {"match": [Health(left_out=hosts)], "execute": [Health(left_out={"h12": left_out(99, events=1)})]}
    )
    lines = [finding.message for finding in judged(seen, seen)]
    assert lines[0] == "of host h12: 1 event, 12 offers (last: Expected `int`)"
    assert [line.split(":")[0] for line in lines[1:-1]] == [f"of host h{number}" for number in range(11, 2, -1)]
    assert lines[-1] == "something of 2 more hosts"


async def test_a_stream_of_rewards_without_a_leader_stops_no_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unavailable(*_args: object) -> None:
        raise BusUnavailable("JetStream system temporarily unavailable")

    monkeypatch.setattr(doctor_working, "last_message", unavailable)
    assert await doctor_working._last_reward(Bus("nats://127.0.0.1:1")) == 0


async def test_a_stream_of_tasks_without_a_leader_stops_no_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unavailable(*_args: object) -> None:
        raise BusUnavailable("JetStream system temporarily unavailable")

    consumers = {lane.name: topology.Part(lane.name, {}, ()) for lane in topology.TASK_LANES}
    monkeypatch.setattr(diagnosis, "find_orphans", unavailable)
    assert await diagnosis.stuck(Bus("nats://127.0.0.1:1"), topology.Inspection({}, consumers)) == []
