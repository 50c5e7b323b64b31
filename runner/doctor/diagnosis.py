"""What is right and wrong with a running cluster: asks, and leaves all as it was. See docs/operating.md."""

import asyncio
import socket
from collections.abc import Iterator
from typing import Any, Final

from loom.bus import topology
from loom.bus.bus import Bus
from loom.bus.hops.orphans import find_orphans
from loom.bus.host_directory import AnnouncedHost, announced_hosts
from loom.bus.natsio.server_errors import Refused
from loom.bus.service_discovery import ANSWER_S, Clocks, ServiceInstance, clocks, discover, own_version, shared_settings
from loom.bus.topology import MIN_SERVER, Inspection, Part
from loom.runner.doctor import agreement
from loom.runner.doctor.findings import Finding
from loom.runner.doctor.findings import fail as _fail
from loom.runner.doctor.findings import ok as _ok
from loom.runner.doctor.findings import warn as _warn
from loom.runner.doctor.working import working
from loom.schemas.config import ClusterConfig
from loom.schemas.envelope import PHASES
from loom.schemas.errors import BusUnavailable, LoomError, Overloaded

CLOCK_S: Final = 1.0
"""An offset from the server's clock that is worth a look; deadlines count in server time."""
FULL: Final = 0.8
"""Share of its limit from which the intake is nearly full."""

PROBE_S: Final = 4.0
"""How long a stream may take to store a message; replicas that have just lost their leader need longer."""

_WRONG_TIME: Final = "its tasks end too early or too late"

AGAIN: Final = "ask again in ten seconds, as replicas may be choosing a leader; else see the server's log"


async def examine(bus: Bus, config: ClusterConfig) -> list[Finding]:
    """Return everything found, in the order it depends on each other; what cannot work is not asked further."""
    findings = [server(bus.connection.server_version, bus.connection.address)]
    if findings[-1].mark == "ok":
        findings.append(await jetstream(bus))
    if findings[-1].mark != "ok":
        return findings
    seen = await topology.inspect(bus, config)
    there, hosts, others, shared = await asyncio.gather(
        discover(bus), announced_hosts(bus, ANSWER_S), clocks(bus), shared_settings(bus)
    )
    return [
        *findings,
        clock(-bus.clock.wall_ahead_s),
        *(process_clocks(others) if bus.clock.measured else ()),
        *design(seen, bus.subjects.namespace),
        *agreement.wire(seen, there),
        *replicas(seen),
        *await storage(bus, seen, config),
        *phases(there),
        *agreement.settings(shared),
        *await working(bus, seen, config),
        node_hosts(hosts),
        *backlog(seen, config),
        *await stuck(bus, seen),
        dead(seen, bus.subjects.stream("DEAD")),
    ]


async def examine_here(bus: Bus) -> list[Finding]:
    """Return whether what runs on this machine answers, which proves its event loop and its connection."""
    there = [each for each in await discover(bus) if each.metadata.get("host") == socket.gethostname()]
    if not there:
        return [_fail("here", "nothing that runs on this machine answers", "see its log; start it again")]
    return [_ok("here", f"{', '.join(sorted(each.name for each in there))} answer")]


def server(version: tuple[int, ...], address: str) -> Finding:
    """Judge the server's version."""
    about = f"nats-server {'.'.join(map(str, version))} at {address}"
    if version >= MIN_SERVER:
        return _ok("server", about)
    least = ".".join(map(str, MIN_SERVER))
    return _fail("server", f"{about} is too old", f"upgrade it to {least} or newer: loom needs message schedules")


async def jetstream(bus: Bus) -> Finding:
    """Ask for JetStream and judge what it has stored."""
    try:
        info = await bus.jetstream.api("INFO")
    except BusUnavailable as error:
        about, _, todo = error.message.partition("; ")
        return _fail("jetstream", about, todo or "see the server's log")
    except Refused as error:
        return _fail("jetstream", f"refused: {error.message}", "enable JetStream for this account")
    return _ok("jetstream", f"{info.get('streams', 0)} streams, {info.get('storage', 0) / 2**20:.1f} MiB stored")


def clock(offset_s: float) -> Finding:
    """Compare the clock of this machine with that of the server."""
    text = f"{_apart(-offset_s)} the server's"
    if abs(offset_s) < CLOCK_S:
        return _ok("clock", text)
    return _warn("clock", text, "synchronise the clocks (NTP): no deadline depends on it, the times in logs do")


def process_clocks(others: list[Clocks]) -> Iterator[Finding]:
    """Judge the clocks of the processes that answer; clocks that agree yield no finding."""
    for each in others:
        process = f"{', '.join(each.services)} ({each.instance}) on {each.host}"
        if abs(each.server_time_off_s) > CLOCK_S:
            text = f"{process} is {_apart(each.server_time_off_s)} the server's time in its decisions"
            yield _fail("clock", text, f"{_WRONG_TIME}: look for server_time_denied in its log, start it again")
        elif abs(each.wall_off_s) > CLOCK_S:
            text = f"the wall clock of {process} is {_apart(each.wall_off_s)} the server's"
            yield _warn("clock", text, "synchronise the clocks (NTP): no deadline depends on it, the times in logs do")


def _apart(seconds: float) -> str:
    return f"{abs(seconds):.2f} s {'ahead of' if seconds > 0 else 'behind'}"


def design(seen: Inspection, namespace: str) -> Iterator[Finding]:
    """Compare streams, buckets and consumers with the topology."""
    parts = [*seen.streams.values(), *seen.consumers.values()]
    missing = [part.name for part in parts if part.info is None and not part.silent]
    if len(missing) == len(parts):
        todo = 'nothing has run here yet: run "loom up"; phases that run already create them within seconds'
        yield _fail("streams", f"none in namespace {namespace}", todo)
        return
    for name in missing:
        todo = "any running phase creates it again within half a minute; if none runs, start one"
        yield _fail("streams", f"{name} is missing", todo)
    for part in parts:
        for difference in part.differences:
            what = "stream" if part.name in seen.streams else "consumer"
            todo = f"give all processes the same LOOM_ settings, or change it with `nats {what} edit`"
            if difference.startswith("allow_rollup_hdrs"):
                todo = "one message could erase all others: start any phase again, it changes that"
            yield _warn("streams", f"{part.name}: {difference}", todo)
    if not missing and not any(part.differences or part.silent for part in parts):
        yield _ok("streams", f"{len(seen.streams)} streams and buckets, {len(seen.consumers)} consumers as designed")


def replicas(seen: Inspection) -> Iterator[Finding]:
    """Judge whether every stream has a leader and replicas that keep up; a single server is not judged."""
    unled = [part.name for part in (*seen.streams.values(), *seen.consumers.values()) if part.silent or _unled(part)]
    for name in unled:
        todo = "more than half of its servers must be up: start those that are down (`nats server list`)"
        yield _fail("replicas", f"{name} has no leader that answers", todo)
    copies = [
        (part.name, each)
        for part in seen.streams.values()
        for each in _cluster(part).get("replicas") or ()
        if part.info
    ]
    behind: dict[str, list[str]] = {}
    for name, each in copies:
        if each.get("offline") or not each.get("current"):
            behind.setdefault(str(each["name"]), []).append(name)
    for server, names in sorted(behind.items()):
        todo = "start that server, or see its log; until it is level, losing another one may stop the cluster"
        yield _warn("replicas", f"{server} is down or behind in {len(names)} streams: {', '.join(sorted(names))}", todo)
    if copies and not behind and not unled:
        yield _ok("replicas", f"{len(copies)} copies are level with their leaders")


def _cluster(part: Part) -> dict[str, Any]:
    cluster: dict[str, Any] = (part.info or {}).get("cluster") or {}
    return cluster


def _unled(part: Part) -> bool:
    return bool(_cluster(part)) and not _cluster(part).get("leader")


async def storage(bus: Bus, seen: Inspection, config: ClusterConfig) -> Iterator[Finding]:
    """Judge whether the streams that must take every message do, by storing one and taking it away again."""
    # Shorter than any row of the table: a stream takes them, and no consumer delivers them.
    probes = {"INTAKE": f"{bus.subjects.namespace}.intake.probe", "TASKS": f"{bus.subjects.namespace}.later.probe"}
    there = {name: seen.streams[bus.subjects.stream(name)].info for name in probes}
    full = there["INTAKE"] is not None and int(there["INTAKE"]["state"]["messages"]) >= config.intake_limit
    asked = [name for name, info in there.items() if info is not None and not (full and name == "INTAKE")]
    reasons = await asyncio.gather(*(_probe(bus, name, probes[name]) for name in asked))
    troubles = [(bus.subjects.stream(name), why) for name, why in zip(asked, reasons, strict=True) if why is not None]
    disk = "make room on its disk, then restart nats-server: it does not write again by itself"
    found = [
        _fail("storage", f"{name} stores nothing: {why.message}", disk if isinstance(why, Overloaded) else AGAIN)
        for name, why in troubles
    ]
    if asked and not troubles:
        found = [_ok("storage", f"{' and '.join(bus.subjects.stream(name) for name in asked)} take messages")]
    return iter(found)


async def _probe(bus: Bus, name: str, subject: str) -> LoomError | None:
    """Store a message on a subject outside every lane and purge it; return the error if that fails.

    Args:
        name: INTAKE or TASKS.
        subject: A subject of that stream that no consumer filters for.
    """
    try:
        await bus.jetstream.publish(subject, b"", within_s=PROBE_S)
        await bus.jetstream.api(f"STREAM.PURGE.{bus.subjects.stream(name)}", {"filter": subject})
    except LoomError as error:
        return error
    return None


def phases(there: list[ServiceInstance]) -> Iterator[Finding]:
    """Judge which phases answer, and whether they are of one version."""
    for name in PHASES:
        versions = [each.version for each in there if each.metadata["service"] == name]
        if not versions:
            yield _fail(f"phase {name}", "does not answer", f'run "loom phase run {name}", or see its log')
        elif set(versions) == {own_version()}:
            yield _ok(f"phase {name}", f"{len(versions)} of version {own_version()}")
        else:
            found = ", ".join(sorted(set(versions)))
            yield _warn(f"phase {name}", f"versions {found} answer, this is {own_version()}", "upgrade all alike")


def node_hosts(hosts: list[AnnouncedHost]) -> Finding:
    """Check that a node can bid."""
    nodes = {(host.owner, node) for host in hosts for node in host.node_ids}
    if not nodes:
        return _warn("hosts", "no node is there to bid", 'add some: "loom host run FILE.py"')
    taken, slots = sum(host.running for host in hosts), sum(host.slots for host in hosts)
    queued = sum(host.queued for host in hosts)
    about = f"{len(hosts)} with {len(nodes)} nodes, {taken} of {slots} slots taken, {queued} queued"
    if slots and taken >= slots and queued:
        return _warn("hosts", about, 'all are busy: add nodes with "loom host run FILE.py"')
    return _ok("hosts", about)


def backlog(seen: Inspection, config: ClusterConfig) -> Iterator[Finding]:
    """Judge what waits for each phase, and what had to be delivered again."""
    infos = {name: part.info for name, part in seen.consumers.items() if part.info is not None}
    waiting = {name: int(info.get("num_pending", 0)) for name, info in infos.items()}
    calm = True
    intake = sum(count for name, count in waiting.items() if name.startswith("intake_"))
    if intake >= FULL * config.intake_limit:
        todo = "clients get `overloaded` at the limit: add nodes, or raise LOOM_INTAKE_LIMIT"
        yield _warn("backlog", f"intake: {intake} of at most {config.intake_limit} wait", todo)
        calm = False
    for name, info in infos.items():
        phase = name.partition("_")[0]
        if not name.startswith("intake_") and waiting[name] > config.max_in_flight:
            yield _warn("backlog", f"{name}: {waiting[name]} wait", f'run more of it: "loom phase run {phase}"')
            calm = False
        if again := int(info.get("num_redelivered", 0)):
            todo = "a phase died or hung with them in hand; ten times make a dead letter: see its log"
            yield _warn("backlog", f"{name}: {again} in hand were delivered again", todo)
            calm = False
    if calm and infos:
        in_hand = sum(int(info.get("num_ack_pending", 0)) for info in infos.values())
        yield _ok("backlog", f"{sum(waiting.values())} wait, {in_hand} in hand, none delivered again")


async def stuck(bus: Bus, seen: Inspection) -> list[Finding]:
    """Check for messages in the stream of tasks that no phase will receive; without any there is no finding."""
    if any(seen.consumers[lane.name].info is None for lane in topology.TASK_LANES):
        return []  # `design` reports it
    try:
        orphans = (await find_orphans(bus)).orphans
    except BusUnavailable:
        return []  # the stream has lost its leader since the inspection, whose findings name the cause
    if not orphans:
        return []
    found = f"{len(orphans)} messages stay in {bus.subjects.stream('TASKS')} that no phase gets, such as "
    return [_warn("orphans", f"{found}{orphans[0].subject}", "SENSE removes them within minutes; else see its log")]


def dead(seen: Inspection, stream: str) -> Finding:
    """Check that no dead letters wait for an operator."""
    part = seen.streams[stream]
    count = int(part.info["state"]["messages"]) if part.info is not None else 0
    if not count:
        return _ok("dead letters", "none")
    todo = "see why: `loom dead ls`, `loom dead show`; then `loom dead retry` or `loom dead rm`"
    return _warn("dead letters", f"{count} wait", todo)
