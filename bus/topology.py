"""Streams, buckets and consumers as data, and one function that makes the server match."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

from loom.bus.bus import Bus
from loom.bus.logs.logger import get_logger
from loom.bus.natsio.server_errors import Refused, ServerErrorCode
from loom.bus.wire_version import WIRE, WIRE_KEY, check_stream
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import Phase
from loom.schemas.errors import BusUnavailable
from loom.schemas.task import PRIORITIES

log = get_logger()

ACK_WAIT_S = 30
MIN_SERVER = (2, 12)  # message schedules
MIB = 1 << 20  # the server sets the bytes of a bounded stream aside on its disk
CREATE_TRIES = 5
_NS = 1_000_000_000
_ROLLUP = "allow_rollup_hdrs"
_METADATA = "metadata"
_NAME_IN_USE = 10058
_STORE_NOT_READY = 10049
_TOO_FEW_SERVERS = {10074, 10005}  # no cluster at all, or one without enough servers for the replicas


class Lane(NamedTuple):
    """One durable consumer: the messages of one phase, or of one priority of it."""

    stream: str
    name: str
    filter: tuple[str, ...]
    """Tokens after the namespace; `*` for any."""


INTAKE_LANES = tuple(Lane("INTAKE", f"intake_{p}", ("intake", "*", p, "*")) for p in PRIORITIES)
MATCH_LANES = tuple(Lane("TASKS", f"match_{p}", ("task", "match", p, "*")) for p in PRIORITIES)
SENSE_LANE = Lane("TASKS", "sense", ("task", "sense", "*", "*"))
SCALE_LANE = Lane("TASKS", "scale", ("task", "scale", "*", "*"))
EXECUTE_LANE = Lane("TASKS", "execute", ("task", "execute", "*", "*"))
EVALUATE_LANE = Lane("TASKS", "evaluate", ("task", "evaluate", "*", "*"))
TASK_LANES = (SENSE_LANE, *MATCH_LANES, SCALE_LANE, EXECUTE_LANE, EVALUATE_LANE)
LANES = (*INTAKE_LANES, *TASK_LANES)
PHASE_LANES: dict[Phase, tuple[Lane, ...]] = {
    "sense": (*INTAKE_LANES, SENSE_LANE),
    "match": MATCH_LANES,
    "scale": (SCALE_LANE,),
    "execute": (EXECUTE_LANE,),
    "evaluate": (EVALUATE_LANE,),
    "adapt": (),
}
"""Phase -> its own consumers; ADAPT reads the stream of rewards without one."""

BUCKETS: dict[str, timedelta] = {
    "records": timedelta(hours=72),
    "plans": timedelta(hours=72),
    "nodes": timedelta(0),
    "tuning": timedelta(0),
}
"""name -> how long a value is kept; 0 is for ever."""


def streams(bus: Bus, config: ClusterConfig) -> Iterator[dict[str, Any]]:
    """Yield the configuration of every stream of the namespace, as the JetStream API takes it."""
    ns = bus.subjects.namespace
    common = {
        "storage": "file",
        "num_replicas": config.replicas,
        "duplicate_window": 120 * _NS,
        _ROLLUP: False,  # one message with a rollup header would erase all others
        _METADATA: {WIRE_KEY: WIRE},
    }
    work = {**common, "retention": "workqueue"}
    limits = {**common, "retention": "limits", "discard": "old"}
    yield {
        **work,
        "name": bus.subjects.stream("INTAKE"),
        "subjects": [f"{ns}.intake.>"],
        "discard": "new",
        "max_msgs": config.intake_limit,
        "max_bytes": 256 * MIB,
    }
    yield {
        **work,
        "name": bus.subjects.stream("TASKS"),
        "subjects": [f"{ns}.task.>", f"{ns}.later.>"],
        "discard": "old",  # never discards: there is no limit, but schedules demand it
        "allow_msg_schedules": True,
        _ROLLUP: True,  # the server sets it with schedules and refuses to unset it
    }
    yield {
        **limits,
        "name": bus.subjects.stream("REWARDS"),
        "subjects": [f"{ns}.reward.>"],
        "max_bytes": 256 * MIB,
    }
    yield {
        **limits,
        "name": bus.subjects.stream("DEAD"),
        "subjects": [f"{ns}.dead.>"],
        "max_bytes": 128 * MIB,
        "max_age": 30 * 86_400 * _NS,
    }
    for name, keep in BUCKETS.items():
        yield {
            **limits,
            "name": f"KV_{bus.subjects.bucket(name)}",
            "subjects": [f"$KV.{bus.subjects.bucket(name)}.>"],
            "discard": "new",
            "max_msgs_per_subject": 1,
            "max_age": int(keep.total_seconds()) * _NS,
            "deny_delete": True,
        }


def consumer(bus: Bus, lane: Lane) -> dict[str, Any]:
    """Return the configuration of a lane's durable consumer."""
    return {
        "durable_name": lane.name,
        "filter_subject": ".".join((bus.subjects.namespace, *lane.filter)),
        "ack_policy": "explicit",
        "ack_wait": ACK_WAIT_S * _NS,
        "max_deliver": -1,  # the loop dead-letters, so that nothing ends in silence
        "max_ack_pending": -1,  # the loop's slots bound what is in hand
        "max_waiting": 2048,
    }


def check_version(bus: Bus) -> None:
    """Return if the server is new enough.

    Raises:
        BusUnavailable: It is not.
    """
    version = bus.connection.server_version
    if version < MIN_SERVER:
        raise BusUnavailable(
            f"nats-server {'.'.join(map(str, version))} is too old; loom needs {MIN_SERVER[0]}.{MIN_SERVER[1]} or newer"
        )


async def init(bus: Bus, config: ClusterConfig) -> list[str]:
    """Create the streams, buckets and consumers that are missing, change nothing else, and return their names.

    Raises:
        BusUnavailable: No answer, or the server refuses a stream.
        WireMismatch: A stream or bucket is of another wire version; nothing has been created then.
    """
    missing = await missing_streams(bus, config)
    created = [str(wanted["name"]) for wanted in missing if await _create_stream(bus, wanted)]
    for name in dict.fromkeys(lane.stream for lane in LANES):
        stored = (await bus.jetstream.api(f"CONSUMER.NAMES.{bus.subjects.stream(name)}"))["consumers"] or []
        for lane in LANES:
            if lane.stream == name and lane.name not in stored:
                await ensure_consumer(bus, lane)
                created.append(lane.name)
    return created


async def missing_streams(bus: Bus, config: ClusterConfig) -> list[dict[str, Any]]:
    """Return the configuration of every stream and bucket that the server does not have.

    Raises:
        BusUnavailable: No answer.
        WireMismatch: One that it has is of another wire version.
    """
    wanted = list(streams(bus, config))
    infos = await asyncio.gather(*(_stream_info(bus, one["name"]) for one in wanted))
    for info in infos:
        if info is not None:
            check_stream(info["config"]["name"], info["config"])
    return [one for one, info in zip(wanted, infos, strict=True) if info is None]


async def check_streams(bus: Bus, config: ClusterConfig) -> None:
    """Return if every stream and bucket is there.

    Raises:
        BusUnavailable: No answer, or one is missing; the message names it and `loom init`.
        WireMismatch: One is of another wire version.
    """
    missing = [str(one["name"]) for one in await missing_streams(bus, config)]
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise BusUnavailable(f"{missing[0]}{more} missing on {bus.connection.address}: run `loom init`, or `loom up`")


async def apply(bus: Bus, config: ClusterConfig) -> list[str]:
    """Create what is missing and return how the rest differs from the design, one sentence each.

    Raises:
        BusUnavailable: The server is too old, has no JetStream, or refuses a stream.
        WireMismatch: As `init`.
    """
    check_version(bus)
    await init(bus, config)
    differences: list[str] = []
    for wanted in streams(bus, config):
        differences += await _compare(bus, wanted)
    for lane in LANES:
        await ensure_consumer(bus, lane)
    await bus.sync_clock()  # the first moment at which a stream is there to ask about
    for difference in differences:
        log.warning("topology_differs", difference=difference)
    return differences


async def delete(bus: Bus, config: ClusterConfig) -> list[str]:
    """Delete every stream and bucket of the namespace, of any wire version, and return the names of those there were.

    Raises:
        BusUnavailable: No answer.
    """
    deleted = []
    for one in streams(bus, config):
        try:
            await bus.jetstream.api(f"STREAM.DELETE.{one['name']}")
        except Refused as error:
            if error.err_code != ServerErrorCode.STREAM_NOT_FOUND:
                raise
        else:
            deleted.append(str(one["name"]))
    return deleted


async def _stream_info(bus: Bus, name: str) -> dict[str, Any] | None:
    try:
        return await bus.jetstream.api(f"STREAM.INFO.{name}")
    except Refused as error:
        if error.err_code != ServerErrorCode.STREAM_NOT_FOUND:
            raise
        return None


class Part(NamedTuple):
    """A stream, bucket or consumer as the server has it."""

    name: str
    info: dict[str, Any] | None
    """The server's whole answer; None where there is no such thing."""
    differences: tuple[str, ...]
    """From the design, each as `key is this, designed that`."""
    silent: str = ""
    """Why the server would not say whether there is such a thing; empty when it did."""


class Inspection(NamedTuple):
    """What `inspect` found."""

    streams: dict[str, Part]
    """name on the server -> a stream or a bucket"""
    consumers: dict[str, Part]
    """lane -> its consumer"""


async def inspect(bus: Bus, config: ClusterConfig) -> Inspection:
    """Return what is there beside what `apply` would make, and change nothing.

    Raises:
        Refused: The server will not say.
    """
    parts = await asyncio.gather(
        *(_part(bus, one["name"], f"STREAM.INFO.{one['name']}", one) for one in streams(bus, config))
    )
    lanes = await asyncio.gather(
        *(
            _part(bus, lane.name, f"CONSUMER.INFO.{bus.subjects.stream(lane.stream)}.{lane.name}", consumer(bus, lane))
            for lane in LANES
        )
    )
    return Inspection({part.name: part for part in parts}, {part.name: part for part in lanes})


async def _part(bus: Bus, name: str, call: str, wanted: dict[str, Any]) -> Part:
    try:
        info = await bus.jetstream.api(call)
    except Refused as error:
        if error.err_code in {ServerErrorCode.STREAM_NOT_FOUND, ServerErrorCode.CONSUMER_NOT_FOUND}:
            return Part(name, None, ())
        raise
    except BusUnavailable as error:  # no leader: the others may well have theirs
        return Part(name, None, (), error.message)
    return Part(name, info, tuple(_differences(info["config"], wanted)))


def _differences(config: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    for key, value in wanted.items():
        if key != _METADATA and (config.get(key) or 0) != (value or 0):
            yield f"{key} is {config.get(key)!r}, designed {value!r}"


async def _compare(bus: Bus, wanted: dict[str, Any]) -> list[str]:
    """Return how a stream differs from the design, after its rollup headers have been turned off."""
    stored: dict[str, Any] = (await bus.jetstream.api(f"STREAM.INFO.{wanted['name']}"))["config"]
    if stored.get(_ROLLUP) and not wanted[_ROLLUP]:
        stored = await _forbid_rollup(bus, stored)
    return [f"{wanted['name']}: {difference}" for difference in _differences(stored, wanted)]


async def _forbid_rollup(bus: Bus, stored: dict[str, Any]) -> dict[str, Any]:
    """Turn rollup headers off for a stream and return its configuration, unchanged where the server refuses."""
    try:
        answer = await bus.jetstream.api(f"STREAM.UPDATE.{stored['name']}", {**stored, _ROLLUP: False})
    except Refused as refusal:
        log.warning("rollup_still_allowed", stream=stored["name"], reason=refusal.message)
        return stored
    config: dict[str, Any] = answer["config"]
    log.info("rollup_forbidden", stream=stored["name"])
    return config


async def _create_stream(bus: Bus, wanted: dict[str, Any]) -> bool:
    """Create a stream that is missing, unless another process is faster; return whether this process has."""
    for left in reversed(range(CREATE_TRIES)):
        try:
            await bus.jetstream.api(f"STREAM.CREATE.{wanted['name']}", wanted)
        except Refused as refusal:
            if refusal.err_code == _NAME_IN_USE:
                check_stream(wanted["name"], (await bus.jetstream.api(f"STREAM.INFO.{wanted['name']}"))["config"])
                return False
            if refusal.err_code != _STORE_NOT_READY or not left:
                todo = ""
                if refusal.err_code in _TOO_FEW_SERVERS:
                    todo = (
                        f"; {wanted['num_replicas']} replicas need as many servers: start them, or lower LOOM_REPLICAS"
                    )
                raise BusUnavailable(f"cannot create stream {wanted['name']}: {refusal.message}{todo}") from refusal
            await asyncio.sleep(0.05)  # seen under load; the next try succeeds
        else:
            return True
    return False


async def ensure_consumer(bus: Bus, lane: Lane) -> None:
    """Create a lane's consumer unless it exists."""
    stream = bus.subjects.stream(lane.stream)
    config = consumer(bus, lane)
    await bus.jetstream.api(
        f"CONSUMER.CREATE.{stream}.{lane.name}.{config['filter_subject']}",
        {"stream_name": stream, "config": config},
    )


async def stream_state(bus: Bus, name: str, *, subjects: str = "") -> dict[str, Any]:
    """Return the state of a stream; with `subjects`, also how many messages match that filter, by subject.

    Raises:
        BusUnavailable: No answer.
        Refused: No such stream.
    """
    body = {"subjects_filter": subjects} if subjects else None
    info = await bus.jetstream.api(f"STREAM.INFO.{bus.subjects.stream(name)}", body)
    state = info.get("state")
    if not isinstance(state, dict) or not all(isinstance(state.get(key), int) for key in ("messages", "last_seq")):
        raise BusUnavailable(f"the answer about stream {name} cannot be read; ask again")
    return state


async def lane_infos(bus: Bus) -> dict[Lane, dict[str, Any]]:
    """Return the server's information on each consumer of the hops.

    Raises:
        BusUnavailable: No answer.
        Refused: One of them is missing.
    """
    stream = bus.subjects.stream("TASKS")
    infos = await asyncio.gather(*(bus.jetstream.api(f"CONSUMER.INFO.{stream}.{lane.name}") for lane in TASK_LANES))
    return dict(zip(TASK_LANES, infos, strict=True))


async def in_flight(bus: Bus) -> int:
    """Return how many hops wait for a phase or are in the hands of one; what is parked until its time is neither.

    Raises:
        BusUnavailable: No answer.
        Refused: A consumer is missing.
    """
    infos = (await lane_infos(bus)).values()
    return sum(int(info["num_pending"]) + int(info["num_ack_pending"]) for info in infos)
