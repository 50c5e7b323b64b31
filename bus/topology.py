"""The design of streams, buckets and consumers as data, and functions that create and compare them."""

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
"""Seconds without an acknowledgement after which the server delivers a message again."""
MIN_SERVER = (2, 12)
"""First version of the server with message schedules."""
MIB = 1 << 20
"""Unit of the streams' limits, which are low because the server reserves that many bytes on its disk."""
CREATE_TRIES = 5
_NS = 1_000_000_000
_ROLLUP = "allow_rollup_hdrs"
_METADATA = "metadata"
_NAME_IN_USE = 10058
_STORE_NOT_READY = 10049
_TOO_FEW_SERVERS = {10074, 10005}  # without a cluster, or with too few servers for the replicas


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
"""Phase -> its durable consumers; ADAPT reads the stream of rewards without one."""

BUCKETS: dict[str, timedelta] = {
    "records": timedelta(hours=72),
    "plans": timedelta(hours=72),
    "nodes": timedelta(0),
    "tuning": timedelta(0),
}
"""Name -> how long a value is kept; 0 is without limit."""


def streams(bus: Bus, config: ClusterConfig) -> Iterator[dict[str, Any]]:
    """Yield the configuration of every stream and bucket of the namespace, in the form of the JetStream API."""
    ns = bus.subjects.namespace
    common = {
        "storage": "file",
        "num_replicas": config.replicas,
        "duplicate_window": 120 * _NS,
        _ROLLUP: False,  # a message with a rollup header would delete all others
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
        "discard": "old",  # required by schedules; without a limit nothing is discarded
        "allow_msg_schedules": True,
        _ROLLUP: True,  # the server sets it for schedules and refuses to unset it
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
    for name, max_age in BUCKETS.items():
        yield {**limits, **_bucket(bus.subjects.bucket(name), max_age)}


def _bucket(name: str, max_age: timedelta) -> dict[str, Any]:
    return {
        "name": f"KV_{name}",
        "subjects": [f"$KV.{name}.>"],
        "discard": "new",
        "max_msgs_per_subject": 1,
        "max_age": int(max_age.total_seconds()) * _NS,
        "deny_delete": True,
    }


def consumer(bus: Bus, lane: Lane) -> dict[str, Any]:
    """Return the configuration of a lane's durable consumer."""
    return {
        "durable_name": lane.name,
        "filter_subject": ".".join((bus.subjects.namespace, *lane.filter)),
        "ack_policy": "explicit",
        "ack_wait": ACK_WAIT_S * _NS,
        "max_deliver": -1,  # the hop loop dead-letters messages and ends their tasks
        "max_ack_pending": -1,  # the slots of the hop loop are the limit
        "max_waiting": 2048,
    }


def check_version(bus: Bus) -> None:
    """Check that the version of the server is supported.

    Raises:
        BusUnavailable: The server is too old.
    """
    version = bus.connection.server_version
    if version < MIN_SERVER:
        raise BusUnavailable(
            f"nats-server {'.'.join(map(str, version))} is too old; loom needs {MIN_SERVER[0]}.{MIN_SERVER[1]} or newer"
        )


async def init(bus: Bus, config: ClusterConfig) -> list[str]:
    """Create missing streams, buckets and consumers, and return their names; existing ones are not changed.

    Raises:
        BusUnavailable: The server does not answer, or refuses a stream.
        WireMismatch: A stream or bucket has another wire version; nothing was created.
    """
    missing = await missing_streams(bus, config)
    created = [str(design["name"]) for design in missing if await _create_stream(bus, design)]
    for name in dict.fromkeys(lane.stream for lane in LANES):
        stored = (await bus.jetstream.api(f"CONSUMER.NAMES.{bus.subjects.stream(name)}"))["consumers"] or []
        for lane in LANES:
            if lane.stream == name and lane.name not in stored:
                await ensure_consumer(bus, lane)
                created.append(lane.name)
    return created


async def missing_streams(bus: Bus, config: ClusterConfig) -> list[dict[str, Any]]:
    """Return the configuration of every missing stream and bucket.

    Raises:
        BusUnavailable: The server does not answer.
        WireMismatch: An existing one has another wire version.
    """
    designs = list(streams(bus, config))
    infos = await asyncio.gather(*(_stream_info(bus, design["name"]) for design in designs))
    for info in infos:
        if info is not None:
            check_stream(info["config"]["name"], info["config"])
    return [design for design, info in zip(designs, infos, strict=True) if info is None]


async def check_streams(bus: Bus, config: ClusterConfig) -> None:
    """Check that every stream and bucket exists.

    Raises:
        BusUnavailable: The server does not answer, or one is missing; the message names it and `loom init`.
        WireMismatch: One has another wire version.
    """
    missing = [str(design["name"]) for design in await missing_streams(bus, config)]
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise BusUnavailable(f"{missing[0]}{more} missing on {bus.connection.address}: run `loom init`, or `loom up`")


async def apply(bus: Bus, config: ClusterConfig) -> list[str]:
    """Create what is missing, and return how existing streams differ from the design, one sentence each.

    Raises:
        BusUnavailable: The server is too old, has no JetStream, or refuses a stream.
        WireMismatch: As `init`.
    """
    check_version(bus)
    await init(bus, config)
    differences: list[str] = []
    for design in streams(bus, config):
        differences += await _compare(bus, design)
    for lane in LANES:
        await ensure_consumer(bus, lane)
    await bus.sync_clock()  # a stream, whose information contains the time, exists now
    for difference in differences:
        log.warning("topology_differs", difference=difference)
    return differences


async def delete(bus: Bus, config: ClusterConfig) -> list[str]:
    """Delete every stream and bucket of the namespace, of any wire version, and return their names.

    Raises:
        BusUnavailable: The server does not answer.
    """
    deleted = []
    for design in streams(bus, config):
        try:
            await bus.jetstream.api(f"STREAM.DELETE.{design['name']}")
        except Refused as error:
            if error.err_code != ServerErrorCode.STREAM_NOT_FOUND:
                raise
        else:
            deleted.append(str(design["name"]))
    return deleted


async def _stream_info(bus: Bus, name: str) -> dict[str, Any] | None:
    try:
        return await bus.jetstream.api(f"STREAM.INFO.{name}")
    except Refused as error:
        if error.err_code != ServerErrorCode.STREAM_NOT_FOUND:
            raise
        return None


class Part(NamedTuple):
    """A stream, bucket or consumer on the server."""

    name: str
    info: dict[str, Any] | None
    """The server's information; None if it does not exist, or the server does not answer."""
    differences: tuple[str, ...]
    """Differences from the design, each as `key is …, designed …`."""
    silent: str = ""
    """Why the server did not answer; empty if it did."""


class Inspection(NamedTuple):
    """The streams and consumers on the server."""

    streams: dict[str, Part]
    """Name on the server -> stream or bucket."""
    consumers: dict[str, Part]
    """Name of the lane -> its consumer."""


async def inspect(bus: Bus, config: ClusterConfig) -> Inspection:
    """Compare the server with the design, without any change.

    Raises:
        Refused: The server refuses to give the information.
    """
    parts = await asyncio.gather(
        *(_part(bus, design["name"], f"STREAM.INFO.{design['name']}", design) for design in streams(bus, config))
    )
    lanes = await asyncio.gather(
        *(
            _part(bus, lane.name, f"CONSUMER.INFO.{bus.subjects.stream(lane.stream)}.{lane.name}", consumer(bus, lane))
            for lane in LANES
        )
    )
    return Inspection({part.name: part for part in parts}, {part.name: part for part in lanes})


async def _part(bus: Bus, name: str, call: str, design: dict[str, Any]) -> Part:
    try:
        info = await bus.jetstream.api(call)
    except Refused as error:
        if error.err_code in {ServerErrorCode.STREAM_NOT_FOUND, ServerErrorCode.CONSUMER_NOT_FOUND}:
            return Part(name, None, ())
        raise
    except BusUnavailable as error:  # it has no leader; the others may have one
        return Part(name, None, (), error.message)
    return Part(name, info, tuple(_differences(info["config"], design)))


def _differences(config: dict[str, Any], design: dict[str, Any]) -> Iterator[str]:
    for key, value in design.items():
        if key != _METADATA and (config.get(key) or 0) != (value or 0):
            yield f"{key} is {config.get(key)!r}, designed {value!r}"


async def _compare(bus: Bus, design: dict[str, Any]) -> list[str]:
    """Forbid rollup headers for a stream, and return how it still differs from the design."""
    stored: dict[str, Any] = (await bus.jetstream.api(f"STREAM.INFO.{design['name']}"))["config"]
    if stored.get(_ROLLUP) and not design[_ROLLUP]:
        stored = await _forbid_rollup(bus, stored)
    return [f"{design['name']}: {difference}" for difference in _differences(stored, design)]


async def _forbid_rollup(bus: Bus, stored: dict[str, Any]) -> dict[str, Any]:
    """Forbid rollup headers for a stream, and return its configuration, which is unchanged if the server refuses."""
    try:
        response = await bus.jetstream.api(f"STREAM.UPDATE.{stored['name']}", {**stored, _ROLLUP: False})
    except Refused as refusal:
        log.warning("rollup_still_allowed", stream=stored["name"], reason=refusal.message)
        return stored
    config: dict[str, Any] = response["config"]
    log.info("rollup_forbidden", stream=stored["name"])
    return config


async def _create_stream(bus: Bus, design: dict[str, Any]) -> bool:
    """Create a missing stream; return False if another process has created it meanwhile."""
    for left in reversed(range(CREATE_TRIES)):
        try:
            await bus.jetstream.api(f"STREAM.CREATE.{design['name']}", design)
        except Refused as refusal:
            if refusal.err_code == _NAME_IN_USE:
                check_stream(design["name"], (await bus.jetstream.api(f"STREAM.INFO.{design['name']}"))["config"])
                return False
            if refusal.err_code != _STORE_NOT_READY or not left:
                todo = ""
                if refusal.err_code in _TOO_FEW_SERVERS:
                    todo = (
                        f"; {design['num_replicas']} replicas need as many servers: start them, or lower LOOM_REPLICAS"
                    )
                raise BusUnavailable(f"cannot create stream {design['name']}: {refusal.message}{todo}") from refusal
            await asyncio.sleep(0.05)  # seen under load; the next try succeeds
        else:
            return True
    return False


async def ensure_consumer(bus: Bus, lane: Lane) -> None:
    """Create the consumer of a lane, unless it exists."""
    stream = bus.subjects.stream(lane.stream)
    config = consumer(bus, lane)
    await bus.jetstream.api(
        f"CONSUMER.CREATE.{stream}.{lane.name}.{config['filter_subject']}",
        {"stream_name": stream, "config": config},
    )


async def stream_state(bus: Bus, name: str, *, subjects: str = "") -> dict[str, Any]:
    """Return the state of a stream.

    Args:
        name: Name in the topology, for example `TASKS`.
        subjects: Filter; the state then contains the number of messages on each subject that matches.

    Raises:
        BusUnavailable: The server does not answer.
        Refused: The stream does not exist.
    """
    body = {"subjects_filter": subjects} if subjects else None
    info = await bus.jetstream.api(f"STREAM.INFO.{bus.subjects.stream(name)}", body)
    state = info.get("state")
    if not isinstance(state, dict) or not all(isinstance(state.get(key), int) for key in ("messages", "last_seq")):
        raise BusUnavailable(f"the server's reply about stream {name} cannot be read; try again")
    return state


async def lane_infos(bus: Bus) -> dict[Lane, dict[str, Any]]:
    """Return the server's information on each consumer of the stream TASKS.

    Raises:
        BusUnavailable: The server does not answer.
        Refused: A consumer does not exist.
    """
    stream = bus.subjects.stream("TASKS")
    infos = await asyncio.gather(*(bus.jetstream.api(f"CONSUMER.INFO.{stream}.{lane.name}") for lane in TASK_LANES))
    return dict(zip(TASK_LANES, infos, strict=True))


async def in_flight(bus: Bus) -> int:
    """Return the number of hops that wait for a phase or are being processed; scheduled messages do not count.

    Raises:
        BusUnavailable: The server does not answer.
        Refused: A consumer does not exist.
    """
    infos = (await lane_infos(bus)).values()
    return sum(int(info["num_pending"]) + int(info["num_ack_pending"]) for info in infos)
