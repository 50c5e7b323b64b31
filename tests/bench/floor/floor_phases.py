"""The phases of the floor: the messages of a task through the loop, with nothing decoded and nothing decided.

A hop's payload begins with 21 digits, the revision of the task's record and the attempt; the rest is filler. Streams,
consumers and subjects are loom's own. Announcements, health checks and measurements of the intake are left out.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import count, cycle

from bench.floor.floor_client import FloorClient, expected_sequence, message_id, scheduled
from bench.floor.floor_profiles import FloorProfiles
from bench.floor.floor_world import FloorWorld
from loom.bus.natsio.transport.message import Msg
from loom.bus.topology import EVALUATE_LANE, EXECUTE_LANE, INTAKE_LANES, MATCH_LANES, SCALE_LANE, Lane
from loom.schemas.envelope import Phase

PREFIX_BYTES = 21
"""Bytes of the revision and the attempt in front of a hop's payload."""
LOTS, LOT_BYTES = 16, 750
"""Most tasks of a shared call, and the bytes of each after the first."""
CALLED_HOSTS = 64
"""Hosts that a call of the reduced pattern goes to."""
RETRY_S = 0.1
ANSWER_TO_BYTES = 64
"""Bytes in front of a call's payload for the subject tokens of the offers."""


class FloorPhases:
    """Moves each task through the phases that run here."""

    def __init__(self, client: FloorClient, world: FloorWorld) -> None:
        self._client, self._world = client, world
        self._subjects = client.subjects
        self._reduced = world.pattern == "reduced"
        self._hosts = cycle(world.hosts)
        self._nodes = cycle(range(world.nodes_each))
        self._tokens = count()
        self._lots: list[tuple[str, bytes, str]] = []
        """Task id, prefix and reply subject of the tasks that the next call shares."""
        self._calls: dict[str, tuple[int, list[tuple[str, bytes, str]]]] = {}
        """Call id -> missing offers, and tasks as in `_lots`."""
        self._runs: dict[str, tuple[str, bytes, str]] = {}
        """Run key -> task id, prefix and reply subject."""
        self._evaluated = count(1)
        self._profiles = FloorProfiles(client, world.sizes)

    async def start(self, names: Sequence[Phase]) -> None:
        """Subscribe for the named phases, and take their messages; only one process may have ADAPT."""
        handlers: dict[Phase, tuple[Lane, Callable[[Msg], None]]] = {
            "sense": (_normal(INTAKE_LANES), self._on_submission),
            "match": (_normal(MATCH_LANES), self._on_match),
            "scale": (SCALE_LANE, self._on_scale),
            "execute": (EXECUTE_LANE, self._on_execute),
            "evaluate": (EVALUATE_LANE, self._on_evaluate),
        }
        of, instance = self._subjects.of, self._client.instance
        await self._client.subscribe(of("offer", "*", "*", instance, "*"), self._on_offer)
        await self._client.subscribe(of("event", "*", "*", instance, "*"), self._on_event)
        if "adapt" in names:
            await self._profiles.start_writing()
        if "match" in names:
            await self._profiles.start_reading()
        for name in names:
            if name in handlers:
                await self._client.pull(*handlers[name])

    # -- SENSE

    def _on_submission(self, msg: Msg) -> None:
        task_id = _task_id(msg)

        def publish_hop(revision: int) -> None:
            self._publish_hop("match", task_id, _prefix(revision, 1), self._world.sizes.match, msg.reply)

        self._write_record(task_id, 0, self._world.sizes.record_created, publish_hop)

    # -- MATCH

    def _on_match(self, msg: Msg) -> None:
        lot = _task_id(msg), msg.data[:PREFIX_BYTES], msg.reply
        if not self._reduced:
            self._call([lot])
            return
        if not self._lots:
            asyncio.get_running_loop().call_soon(self._call_for_lots)
        self._lots.append(lot)

    def _call_for_lots(self) -> None:
        lots, self._lots = self._lots, []
        for first in range(0, len(lots), LOTS):
            self._call(lots[first : first + LOTS])

    def _call(self, lots: list[tuple[str, bytes, str]]) -> None:
        call_id = f"{next(self._tokens):016x}"
        answer_to = f"{self._client.instance}.{call_id}".encode().ljust(ANSWER_TO_BYTES)
        filler = self._world.sizes.call - ANSWER_TO_BYTES + (len(lots) - 1) * LOT_BYTES
        payload = answer_to + b"x" * filler
        hosts = self._world.hosts
        if self._reduced and len(hosts) > CALLED_HOSTS:
            hosts = hosts[:CALLED_HOSTS]
            subjects = [self._subjects.of("call", "local", host) for host in hosts]
        else:
            subjects = [self._subjects.of("auction", "code")]
        self._calls[call_id] = len(hosts), lots
        for subject in subjects:
            self._client.publish(subject, "", payload, b"")

    def _on_offer(self, msg: Msg) -> None:
        call_id = msg.subject.rpartition(".")[2]
        missing, lots = self._calls[call_id]
        if missing > 1:
            self._calls[call_id] = missing - 1, lots
            return
        del self._calls[call_id]
        for task_id, prefix, reply in lots:
            self._publish_hop("execute" if self._reduced else "scale", task_id, prefix, self._world.sizes.scale, reply)

    # -- SCALE

    def _on_scale(self, msg: Msg) -> None:
        self._publish_hop("execute", _task_id(msg), msg.data[:PREFIX_BYTES], self._world.sizes.execute, msg.reply)

    # -- EXECUTE

    def _on_execute(self, msg: Msg) -> None:
        task_id, (revision, attempt) = _task_id(msg), _parsed(msg.data)

        def request_run(claimed: int) -> None:
            run_key, host = f"{next(self._tokens):016x}", next(self._hosts)
            self._runs[run_key] = task_id, _prefix(claimed, attempt), msg.reply
            reply = self._subjects.of("event", "local", host, self._client.instance, run_key)
            self._client.publish(self._subjects.of("run", "local", host), reply, b"x" * self._world.sizes.run, b"")

        self._write_record(task_id, revision, self._world.sizes.record_claimed, request_run)

    def _on_event(self, msg: Msg) -> None:
        if len(msg.data) <= self._world.sizes.run_accepted:
            return
        task_id, prefix, reply = self._runs.pop(msg.subject.rpartition(".")[2])
        subject = self._subjects.of("delta", "public", task_id)
        for _ in range(1 if self._reduced else 3):
            self._client.publish(subject, "", b"x" * self._world.sizes.delta, b"")
        self._publish_hop("evaluate", task_id, prefix, self._world.sizes.evaluate, reply)

    # -- EVALUATE

    def _on_evaluate(self, msg: Msg) -> None:
        task_id, (revision, attempt) = _task_id(msg), _parsed(msg.data)
        fail_every = self._world.fail_every
        if fail_every and attempt == 1 and next(self._evaluated) % fail_every == 0:
            self._publish_reward(task_id, attempt, lambda _: self._schedule_attempt(task_id, revision, msg.reply))
            return

        def end(_: int) -> None:
            self._publish_reward(task_id, attempt, lambda _: self._client.ack(msg.reply))
            subject = self._subjects.of("result", "public", task_id)
            self._client.publish(subject, "", b"x" * self._world.sizes.result, b"")

        self._write_record(task_id, revision, self._world.sizes.record_ended, end)

    def _publish_reward(self, task_id: str, attempt: int, on_stored: Callable[[int], None]) -> None:
        node = f"{next(self._hosts)}-{next(self._nodes)}"
        subject = self._subjects.of("reward", "rules", "local", node, "code")
        headers = message_id(f"{task_id}:{attempt}:rules")
        self._client.store(subject, b"x" * self._world.sizes.reward, headers, on_stored)

    def _schedule_attempt(self, task_id: str, revision: int, reply: str) -> None:
        at = (datetime.fromtimestamp(time.time(), UTC) + timedelta(seconds=RETRY_S)).isoformat()
        headers = scheduled(self._subjects.task("match", "normal", task_id), at, f"{task_id}:retry")
        payload = _prefix(revision, 2).ljust(self._world.sizes.evaluate, b"x")
        subject = self._subjects.later("evaluate", task_id, "retry")
        self._client.store(subject, payload, headers, lambda _: self._client.ack(reply))

    # -- all phases

    def _write_record(self, task_id: str, revision: int, size: int, on_stored: Callable[[int], None]) -> None:
        subject = f"$KV.{self._subjects.bucket('records')}.{task_id}"
        self._client.store(subject, b"x" * size, expected_sequence(revision), on_stored)

    def _publish_hop(self, phase: Phase, task_id: str, prefix: bytes, size: int, reply: str) -> None:
        """Store the message for the next phase, then acknowledge the message of this one."""
        subject = self._subjects.task(phase, "normal", task_id)
        headers = message_id(f"{task_id}:{phase}:{prefix[-1]}")
        self._client.store(subject, prefix.ljust(size, b"x"), headers, lambda _: self._client.ack(reply))


def _task_id(msg: Msg) -> str:
    return msg.subject.rpartition(".")[2]


def _prefix(revision: int, attempt: int) -> bytes:
    return b"%020d%d" % (revision, attempt)


def _parsed(payload: bytes) -> tuple[int, int]:
    return int(payload[: PREFIX_BYTES - 1]), int(payload[PREFIX_BYTES - 1 : PREFIX_BYTES])


def _normal(lanes: Sequence[Lane]) -> Lane:
    """Return the lane of tasks with normal priority."""
    return next(lane for lane in lanes if lane.name.endswith("_normal"))
